"""How good are the classroom backbones? The figures of README's model card.

What this file teaches: retrieval, the usual score of a CLIP, does not measure what Flamingo needs. A CLIP that finds
97 of 100 captions may have patch tokens that hold neither what they show nor where they stand. So we probe them, with
the simplest classifier there is: a linear one.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo.classroom import scenes
from flamingo.interop import compat

PATCH = 16  # pixels, of the classroom CLIP

TEXTS, PICTURES = 512, 3000


def linear_probe(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, classes: int) -> float:
    """Accuracy of ridge regression onto one-hot classes. x (M, d), y (M,)."""
    with_bias = lambda t: torch.cat([t, torch.ones(len(t), 1)], dim=1).double()  # noqa: E731
    x, x_test = with_bias(x), with_bias(x_test)
    gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ F.one_hot(y, classes).double())
    return ((x_test @ weights).argmax(-1) == y_test).float().mean().item()


def _drawn(split: str, count: int, layouts: tuple[str, ...]) -> list[scenes.Scene]:
    drawn = (scenes.make_scene(77, split, i) for i in range(20 * count))
    kept = (scene for scene in drawn if scene.layout in layouts)
    return [scene for scene, _ in zip(kept, range(count), strict=False)]


@torch.no_grad()
def _tokens(clip, to_pixels, drawn: list[scenes.Scene]) -> Tensor:
    """(N, 36, d) patch tokens, as Flamingo reads them."""
    batches = [drawn[i : i + 256] for i in range(0, len(drawn), 256)]
    pixels = (to_pixels([scene.draw() for scene in batch]) for batch in batches)
    read = dict(norm=True, class_token=False)
    return torch.cat([compat.open_clip_patches(clip.visual, p, **read).float() for p in pixels])


def probe_patches(clip, to_pixels, patch_names, names: dict[str, int], pictures: int = PICTURES) -> float:
    """Name of the object a patch shows, read linearly off its token; scenes with object pairs never seen together."""

    def shown(split: str, count: int) -> tuple[Tensor, Tensor]:
        drawn = _drawn(split, count, ("one", "count", "row", "column", "three"))
        targets = torch.from_numpy(np.stack([patch_names(scene, names) for scene in drawn]))  # (N, 36)
        asked = (targets >= 0) & (targets < len(scenes.OBJECTS))
        return _tokens(clip, to_pixels, drawn)[asked], targets[asked]

    return linear_probe(*shown("train", pictures), *shown("test", pictures // 3), len(names))


def probe_left_half(clip, to_pixels, names: dict[str, int], pictures: int = 3 * PICTURES) -> float:
    """Which of two objects is in the left half, read linearly off the mean of the left half's tokens. An encoder that
    spreads what it knows over all its tokens fails here, however good its retrieval."""
    side = scenes.IMAGE_SIZE // PATCH
    left = torch.arange(side * side) % side < side // 2  # (36,)

    def pairs(split: str, count: int) -> tuple[Tensor, Tensor]:
        drawn = _drawn(split, count, ("row",))
        drawn = [scene for scene in drawn if scene.objects[0].box[2] <= 48 <= scene.objects[1].box[0]]
        tokens = _tokens(clip, to_pixels, drawn)[:, left].mean(dim=1)
        return tokens, torch.tensor([names[scene.names[0]] for scene in drawn])

    return linear_probe(*pairs("train", pictures), *pairs("test", pictures // 3), len(names))


def probe_arrangement(clip, to_pixels, arrangement, kinds: int, pictures: int = PICTURES) -> float:
    """How the scene is arranged (one thing, two alike, two in a row, …), read linearly off any single patch token;
    scenes with object pairs never seen together."""

    def seen(split: str, count: int) -> tuple[Tensor, Tensor]:
        drawn = _drawn(split, count, scenes.LAYOUTS)
        tokens = _tokens(clip, to_pixels, drawn)[:, ::7]  # every seventh patch: one from each line and column
        kind = torch.tensor([arrangement(scene) for scene in drawn])  # (N,)
        return tokens.flatten(0, 1), kind.repeat_interleave(tokens.shape[1])

    return linear_probe(*seen("train", pictures), *seen("test", pictures // 3), kinds)


@torch.no_grad()
def retrieval(clip, tokenizer, to_pixels) -> dict[str, float]:
    """Right caption first among 512 of held-out scenes, and right picture first for a caption."""
    drawn = list(
        {
            scene.caption("sentence"): scene for scene in _drawn("test", 2 * TEXTS, ("one", "row", "column", "three"))
        }.values()
    )
    drawn = drawn[:TEXTS]
    image = F.normalize(clip.encode_image(to_pixels([scene.draw() for scene in drawn])), dim=-1)
    text = F.normalize(clip.encode_text(tokenizer([f" {scene.caption('sentence')}" for scene in drawn])), dim=-1)
    same = torch.arange(len(drawn))
    scores = image @ text.T
    return {
        "caption_of_picture": (scores.argmax(1) == same).float().mean().item(),
        "picture_of_caption": (scores.argmax(0) == same).float().mean().item(),
    }


@torch.no_grad()
def recall(lm, tokenizer, documents: list[list[str]]) -> float:
    """How often the model predicts the last word of each document, all its tokens, having read it in a line before."""
    right = 0
    for lines in documents:
        before, word = "\n".join(lines).rsplit(" ", 1)
        ids, known = tokenizer(f"{before} {word}").input_ids, len(tokenizer(before).input_ids)
        predicted = lm(input_ids=torch.tensor([ids])).logits[0].argmax(dim=-1)
        right += predicted[known - 1 : -1].tolist() == ids[known:]
    return right / len(documents)


@torch.no_grad()
def perplexity(lm, tokenizer, texts: list[str]) -> float:
    """exp of the mean loss per token, each text read from its beginning."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids[: tokenizer.model_max_length]])
        loss = lm(input_ids=ids, labels=ids).loss.item()
        total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return math.exp(total / count)
