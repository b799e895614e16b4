"""The diagrams of README and the notebooks, drawn from the model itself.

    python -m flamingo.figures.diagrams            writes the five .svg files of assets/

What this file teaches: a diagram need not be believed when it is made by the code it explains. The shapes are read off
a live model by forward hooks, the mask is what `media_attention_mask` returns. So a diagram cannot grow old unnoticed.

Here are the whole model, one layer and the mask; `picture_diagrams.py` draws the pictures' way to the latents, and
`drawing.py` has what all are drawn with. The functions at the end draw the small pictures of the notebooks.
"""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from flamingo.figures.drawing import (
    DATA,
    FROZEN,
    PICTURE_COLORS,
    SOFT,
    TRAINED,
    WORDS,
    Card,
    classroom_model,
    observed_shapes,
    shape,
)
from flamingo.figures.run_figures import plt
from flamingo.model.cross_attention import media_attention_mask


# ------------------------------------------------------------------------------------------------ the architecture
def architecture(path: Path) -> None:
    """The whole model, bottom to top as in the paper's figure 3, with the shapes of one picture and one text."""
    model, processor, scene = classroom_model()
    lm = model.lang_encoder
    layers = lm._get_decoder_layers()
    pixels = processor.preprocess_images([scene.draw()])  # (N, F, C, H, W)
    inputs = processor.encode_text(f"{WORDS} As a list:")
    run = lambda: model(inputs["input_ids"], pixel_values=pixels[None])  # noqa: E731
    seen = observed_shapes(
        model, run, encoder=model.vision_encoder, resampler=model.vision_tokenizer, words=lm.get_input_embeddings(),
        block=layers[0].gated_cross_attn_layer, decoder=layers[0].decoder_layer, head=lm.get_output_embeddings(),
    )  # fmt: skip

    card = Card(800, 640)
    left, right, w = 40, 430, 250  # of the two columns
    card.picture(left + w / 2 - 42, 38, 84, scene.draw())
    card.text(left + w / 2, 26, f"pixels {shape(pixels)}")
    card.arrow((left + w / 2, 122), (left + w / 2, 160))
    card.box(left, 160, w, 56, "vision encoder\n(CLIP)", FROZEN, 14)
    card.arrow((left + w / 2, 216), (left + w / 2, 290))
    card.text(left + w / 2 + 10, 253, f"patch features\n{seen['encoder']}", ha="left")
    card.box(left, 290, w, 56, "Perceiver resampler", TRAINED, 14)
    card.text(left + w / 2 - 10, 375, f"latents\n{seen['resampler']}", ha="right")
    middle = left + w / 2

    card.box(right, 16, w, 34, f"{WORDS} As a list:", DATA, 13)
    card.arrow((right + w / 2, 50), (right + w / 2, 78))
    card.text(right + w / 2 + 10, 64, f"token ids {shape(inputs['input_ids'])}", ha="left")
    card.box(right, 78, w, 40, "token embeddings", FROZEN, 14)
    y, step = 140, 92
    trunk = right - 32  # where the latents go up beside the language model
    for i in range(len(layers)):
        card.arrow((right + w / 2, y - 22), (right + w / 2, y))
        card.box(right, y, w, 31, "gated cross-attention", TRAINED, 13)
        card.box(right, y + 36, w, 31, f"decoder layer {i}", FROZEN, 13)
        card.arrow((trunk, y + 15), (right, y + 15), color=TRAINED[1])
        y += step
    card.text(right + w / 2 + 10, 129, f"hidden states {seen['words']}", ha="left")
    card.arrow((middle, 346), (middle, 410), (trunk, 410), color=TRAINED[1], head=False)
    card.arrow((trunk, 155), (trunk, y - step + 15), color=TRAINED[1], head=False)
    card.text((middle + trunk) / 2, 424, "keys and values for every layer", 12, SOFT)
    card.arrow((right + w / 2, y - 25), (right + w / 2, y))
    card.box(right, y, w, 36, "language model head", FROZEN, 14)
    card.arrow((right + w / 2, y + 36), (right + w / 2, y + 66))
    card.text(right + w / 2 + 10, y + 48, f"logits {seen['head']}", ha="left")
    card.text(right + w / 2, y + 78, scene.caption("list"), 15, PICTURE_COLORS[0], weight="bold")

    card.box(left, 560, 22, 18, "", FROZEN)
    card.text(left + 32, 569, "frozen: as it came", ha="left")
    card.box(left, 530, 22, 18, "", TRAINED)
    card.text(left + 32, 539, "trained: all that is new", ha="left")
    card.text(left, 500, f"the added tokens ({WORDS}, <|endofchunk|>)\nare trained as well", 12, SOFT, ha="left")
    card.save(path)


# --------------------------------------------------------------------------------------------------- one layer
def flamingo_layer(path: Path) -> None:
    """A FlamingoLayer: what its gates multiply, and the shapes inside."""
    model, processor, scene = classroom_model()
    layer = model.lang_encoder._get_decoder_layers()[0]
    block, inputs = layer.gated_cross_attn_layer, processor.encode_text(f"{WORDS} As a list:")
    latents = model.tokenize_images(model.encode_images(processor.preprocess_images([scene.draw()])))
    run = lambda: model(inputs["input_ids"], latents=latents[None])  # noqa: E731
    seen = observed_shapes(
        model, run, q=block.attn.to_q, attn=block.attn, wide=block.ff[1], ff=block.ff, decoder=layer.decoder_layer
    )
    keys, _ = block.attn.project_media(latents)

    card = Card(800, 560)
    x, w, plus = 250, 250, 600  # the boxes, and the way around them
    centre = x + w / 2
    card.text(plus, 22, f"hidden states {seen['attn']}", 13)
    card.arrow((plus, 34), (plus, 458))
    card.arrow((plus, 502), (plus, 528))
    card.text(plus, 542, "to the next layer", 13)

    def branch(y: float, text: str, gate: str, inner: str) -> None:
        """From the way around, through a box and its gate, and back with a plus."""
        card.arrow((plus, y - 26), (centre, y - 26), (centre, y))
        card.box(x, y, w, 52, text, TRAINED, 14)
        card.text(centre + 10, y - 13, inner, 12, SOFT, ha="left")
        card.arrow((centre, y + 52), (centre, y + 86))
        card.box(x + 35, y + 86, w - 70, 30, f"× tanh({gate})", ("#fff3c4", "#c99a06"), 14)
        card.arrow((centre, y + 116), (centre, y + 140), (plus - 11, y + 140))
        card.plus(plus, y + 140)

    branch(82, "masked cross-attention", "attn_gate", f"queries {seen['q']}")
    branch(272, "feed-forward", "ff_gate", f"widened to {seen['wide']}")
    card.box(plus - w / 2, 458, w, 44, "decoder layer", FROZEN, 14)

    card.box(24, 82, 150, 52, f"latents\n{shape(latents)}", DATA, 13)
    card.arrow((174, 108), (x, 108), color=TRAINED[1])
    card.text(212, 140, f"keys, values\n{shape(keys)}", 12, SOFT, va="bottom")
    card.box(24, 196, 150, 52, "who sees what", DATA, 13)
    card.arrow((174, 222), (x + 18, 222), (x + 18, 134), color=SOFT)
    closed = "both gates start at 0,\ntanh(0) = 0: nothing\nis added, and the\nlanguage model is\nthe one it was"
    card.text(plus + 24, 248, closed, 12, SOFT, ha="left")
    card.text(plus + w / 2 - 4, 446, "frozen", 12, SOFT, ha="right", va="top")
    card.save(path)


# ------------------------------------------------------------------------------------------------------- the mask
def mask_panel(
    axes: plt.Axes, words: Sequence[str], only_immediate: bool = True, pictures: Sequence = (), size: float = 8
) -> Tensor:
    """One text, written left to right; a filled cell where its token sees a picture. → the mask (T_txt, T_img) drawn.

    words: "<image>" announces a picture. pictures: drawn at the left; numbers if there are none. size: of letters.
    """
    media = torch.tensor([[word == WORDS for word in words]])  # (1, T_txt)
    count = int(media.sum())
    media_mask = media_attention_mask(media, torch.arange(count)[None], only_immediate)
    sees = (
        media_mask.sees_image[0].expand(-1, count) if media_mask.mask is None else media_mask.mask[0]
    )  # (T_txt, T_img)
    for t, word in enumerate(words):
        for k in range(count):
            color = PICTURE_COLORS[k % len(PICTURE_COLORS)] if sees[t, k] else "#f3f4f6"
            axes.add_patch(plt.Rectangle((t + 0.04, count - 1 - k + 0.06), 0.92, 0.88, fc=color, ec="none"))
        latest = int(media[0, : t + 1].sum()) - 1
        color = PICTURE_COLORS[latest % len(PICTURE_COLORS)] if media_mask.sees_image[0, t] else SOFT
        axes.text(t + 0.5, count + 0.16, word, ha="center", va="bottom", fontsize=size, color=color)
    for k in range(count):
        if pictures:
            axes.imshow(pictures[k], extent=(-0.7, -0.15, count - 0.98 - k, count - 0.02 - k), aspect="auto")
        else:
            axes.text(-0.15, count - 0.5 - k, f"picture {k + 1}", ha="right", va="center", fontsize=size)
    axes.set(xlim=(-1.3, len(words)), ylim=(0, count + 0.6))
    axes.axis("off")
    return sees


SHOWN_TEXTS = (
    ("One picture", f"{WORDS} a cat"),
    ("Two pictures: after the second, words see the second only", f"{WORDS} a cat {WORDS} a dog"),
    (
        "Three pictures, and words before the first, which see nothing",
        f"my friends: {WORDS} a cat {WORDS} a dog {WORDS} a fox",
    ),
)


def masks(path: Path) -> None:
    """The mask for one, two and three pictures."""
    from flamingo.classroom.scenes import sprite

    drawings = [ImageOps.pad(sprite(name, 64), (64, 64)) for name in ("cat", "dog", "fox")]
    card = Card(800, 470)
    top, cell, row = 462, 60, 34
    for title, text in SHOWN_TEXTS:
        words = text.split()
        count = words.count(WORDS)
        height = (count + 0.6) * row
        card.text(30, top - 18, title, 14, ha="left", weight="bold")
        size = ((len(words) + 1.3) * cell / 800, height / 470)
        axes = card.figure.add_axes((24 / 800, (top - 40 - height) / 470, *size))
        mask_panel(axes, words, pictures=drawings, size=11.5)
        top -= height + 62
    card.save(path)


# --------------------------------------------------------------------------------------------- for the notebooks
def show_pictures(pictures: Sequence, titles: Sequence[str] = (), size: float = 1.7, columns: int = 6) -> None:
    """Pictures (PIL, or arrays (H, W, C)) side by side, each with a title in small letters."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    height = size * (1.35 if titles else 1)  # of a row
    figure, grid = plt.subplots(rows, columns, figsize=(size * columns, height * rows), squeeze=False, dpi=80)
    for axes in grid.flat:
        axes.axis("off")
    for axes, picture, title in itertools.zip_longest(grid.flat[: len(pictures)], pictures, titles):
        axes.imshow(picture)
        lines = [textwrap.fill(line, int(13 * size)) for line in (title or "").splitlines()]
        axes.set_title("\n".join(lines), fontsize=8)
    figure.tight_layout()


def show_maps(
    picture: Image.Image, maps: Tensor, titles: Sequence[str] = (), size: float = 1.2, columns: int = 8
) -> None:
    """Maps (M, rows, columns) over the same picture: lit where a map is large, dark where it is small. Each has its
    own scale."""
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(size * columns, 1.2 * size * rows), squeeze=False, dpi=80)
    for axes in grid.flat:
        axes.axis("off")
    width, height = picture.size
    for axes, values, title in itertools.zip_longest(grid.flat[: len(maps)], maps.float(), titles):
        axes.imshow(picture)
        shade = torch.zeros(*values.shape, 4)  # black, and the more transparent the larger the value
        shade[..., 3] = 0.9 * (1 - (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12))
        axes.imshow(shade, extent=(0, width, height, 0))
        axes.set_title(title or "", fontsize=8)
    figure.tight_layout()


if __name__ == "__main__":
    from flamingo.figures.picture_diagrams import bank, resampler
    from flamingo.files import asset

    drawn = {
        "architecture": architecture, "resampler": resampler, "flamingo_layer": flamingo_layer,
        "who_sees_what": masks, "bank": bank,
    }  # fmt: skip
    for name, draw in drawn.items():
        draw(asset(f"{name}.svg"))
        print(f"wrote assets/{name}.svg")
