"""A picture, lit where a word's attention is."""

import numpy as np
from PIL import Image, ImageDraw

from flamingo.classroom import scenes
from flamingo.data.pictures import enlarged
from flamingo.evaluation.attention import WordLook

SIDE = 384  # pixels of the longer side


def heat_map(picture: Image.Image, look: WordLook, scene: scenes.Scene | None = None) -> Image.Image:
    """scene: of the picture, to draw a white box around the things that the word names."""
    from matplotlib import colormaps  # here: the page's first caption comes sooner without

    picture = enlarged(picture, SIDE).convert("RGB")
    share = look.grid / look.grid.max().clamp(min=1e-12)  # (rows, columns), the largest is 1
    shares = Image.fromarray((share.numpy() * 255).astype(np.uint8)).resize(picture.size, Image.BICUBIC)
    weight = np.asarray(shares)[..., None] / 255
    colors = colormaps["inferno"](weight[..., 0])[..., :3] * 255
    mixed = np.asarray(picture) * (0.45 - 0.25 * weight) + colors * (0.35 + 0.4 * weight)
    lit = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    if scene:
        scale, draw = SIDE / scenes.IMAGE_SIZE, ImageDraw.Draw(lit)
        for placed in scene.objects:
            if look.word in (placed.name, scenes.plural(placed.name)):
                draw.rectangle([side * scale for side in placed.box], outline="white", width=3)
    return lit
