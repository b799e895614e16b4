"""The diagrams of the pictures' way to the language model: the resampler, and the bank that texts point into.

What this file teaches: the two economies of Flamingo. However many patches a picture or a film has, it becomes n
latents; and however many texts are about a picture, it is encoded once. Written by
`python -m flamingo.figures.diagrams`.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import ImageChops
from torch import Tensor

from flamingo.data.chunks import Chunk
from flamingo.data.processor import pad_image_index
from flamingo.figures.drawing import DATA, INK, PICTURE_COLORS, SOFT, TRAINED, WORDS, Card, classroom_model, shape
from flamingo.figures.run_figures import plt
from flamingo.model.resampler import PerceiverResampler

GHOST = 0.45  # how solid the film is drawn beside the still
FRAME_COLORS = (PICTURE_COLORS[0], PICTURE_COLORS[3], PICTURE_COLORS[2])  # no brown: the latents are orange


# ------------------------------------------------------------------------------------------------- the resampler
def key_list(card: Card, resampler: PerceiverResampler, features: Tensor, x: float, y: float, alpha: float = 1.0):
    """What the latents of the first layer attend to, as cells: patches in the colour of their frame, then latents.

    features: (1, F, v, d). → keys (1, h, F·v + n, c), and where the list ends.
    """
    attention = resampler.layers[0][0]
    with torch.no_grad():
        _, keys, _ = attention.queries_keys_values(features.flatten(1, 2), resampler.latents[None])
    for frame in range(features.shape[1]):
        x = card.cells(x, y, features.shape[2], FRAME_COLORS[frame], alpha=alpha)
    latents = keys.shape[2] - features.shape[1] * features.shape[2]
    return keys, card.cells(x, y, latents, TRAINED[1], alpha=alpha)


def resampler(path: Path) -> None:
    """The Perceiver resampler, bottom to top, with the shapes of a still and, paler, of a film."""
    from flamingo.classroom.scenes import make_scene

    model, processor, _ = classroom_model()
    perceiver = model.vision_tokenizer
    first = make_scene(0, "test", 12, layout="one").draw()
    film = [ImageChops.offset(first, 30 * frame, 0) for frame in range(3)]  # the thing moves
    features = model.encode_images(processor.preprocess_images(film).transpose(0, 1))  # (1, F, v, d)
    still = features[:, :1]
    with torch.no_grad():
        out = perceiver(still)
        queries, _, _ = perceiver.layers[0][0].queries_keys_values(still.flatten(1, 2), perceiver.latents[None])
        assert perceiver(features).shape == out.shape  # what the diagram shows

    card = Card(800, 668)
    left, x, w, stream = 44, 250, 290, 690  # of the lists, of the boxes, of the latents on their way up
    centre, n = x + w / 2, len(perceiver.latents)
    for frame, picture in enumerate(film):
        card.picture(left + 88 * frame, 24, 78, picture, None if frame == 0 else GHOST)
        card.cells(left + 88 * frame, 18, 1, FRAME_COLORS[frame], (104, 5), 1.0 if frame == 0 else GHOST)
    card.text(left + 280, 78, f"patch features of a still\n{shape(still)}", 16, ha="left")
    card.text(left + 280, 36, f"of {len(film)} frames {shape(features)}", 16, SOFT, ha="left")
    card.arrow((left + 39, 104), (left + 39, 158))
    card.text(left + 49, 127, "vision encoder, all patches in one list", 16, SOFT, ha="left")
    card.box(stream - 76, 24, 152, 78, "", TRAINED)
    card.text(stream, 74, f"learned latents\n{shape(perceiver.latents)}", 16)
    card.cells(stream - 35, 32, n, TRAINED[1], (4.4, 16))
    card.arrow((stream, 102), (stream, 556), color=TRAINED[1])

    card.frame(18, 160, 764, 368)  # what every layer does
    ends = {}
    for y, one, alpha, color in ((190, features, GHOST, SOFT), (246, still, 1.0, INK)):
        keys, ends[y] = key_list(card, perceiver, one, left, y, alpha)
        frames, patches = one.shape[1:3]
        name = "a still: " if frames == 1 else f"{frames} frames: {frames} · "
        card.text(left, y - 13, f"{name}{patches} + {n} = {keys.shape[2]} keys {shape(keys)}", 16, color, ha="left")
        card.arrow((stream, y + 10), (ends[y] + 2, y + 10), color=TRAINED[1])
        card.arrow((left - 4, y + 10), (left - 14, y + 10), (left - 14, 341), (x, 341), color=color)
    card.text((ends[246] + stream) / 2, 268, "and the latents themselves", 16, SOFT)
    card.text(left, 355, "keys and values", 16, ha="left")

    def branch(y: float, text: str, note: str) -> None:
        """From the latents through a box, and added to them."""
        card.arrow((stream, y - 28), (centre, y - 28), (centre, y), color=TRAINED[1])
        card.text(centre + 10, y - 14, note, 16, ha="left")
        card.box(x, y, w, 46, text, TRAINED, 17)
        card.arrow((centre, y + 46), (centre, y + 64), (stream - 11, y + 64))
        card.plus(stream, y + 64)

    branch(318, "attention", f"queries {shape(queries)}")
    branch(430, "feed-forward", "each latent alone")
    card.text(left, 480, f"{len(perceiver.layers)} layers\n(depth)", 17, ha="left", weight="bold")
    card.box(stream - 76, 556, 152, 34, "LayerNorm", TRAINED, 16)
    card.arrow((stream, 590), (stream, 616))
    card.cells(stream - 35, 620, n, TRAINED[1])
    card.text(stream - 90, 630, f"latents {shape(out)}: {n} for a still, {n} for a film", 17, ha="right", weight="bold")
    card.save(path)


# ------------------------------------------------------------------------------------------------------ the bank
def index_matrix(card: Card, index: Tensor, x: float, rows: Sequence[float], side: float = 34) -> None:
    """image_index (B, T_img) as a table: each cell in the colour of the picture it points at, empty slots pale.

    rows: the middle of each text's row.
    """
    for y, slots in zip(rows, index.tolist(), strict=True):
        for slot, picture in enumerate(slots):
            colors = ("#f3f4f6", DATA[1]) if picture < 0 else (PICTURE_COLORS[picture], PICTURE_COLORS[picture])
            card.box(x + slot * side, y - side / 2, side - 3, side - 3, "", colors)
            middle = (x + slot * side + (side - 3) / 2, y - 1.5)
            card.text(*middle, str(picture), 17, SOFT if picture < 0 else "white", weight="bold")


def bank_texts(scenes: Sequence) -> list[list[Chunk]]:
    """Texts about four scenes: the five captions of the first, a prompt with two examples, a prompt with one."""
    from flamingo.classroom.scenes import STYLES

    captions = [[Chunk(0, "", scenes[0].caption(style))] for style in STYLES]
    example = lambda i: Chunk(i, "", scenes[i].caption("list"))  # noqa: E731
    return [*captions, [example(1), example(0), Chunk(2)], [example(1), Chunk(3)]]


def bank(path: Path) -> None:
    """Pictures encoded once, texts that point at them, and the index between them."""
    from flamingo.classroom.scenes import make_scene

    model, processor, _ = classroom_model()
    chosen = ((14, "one"), (15, "row"), (28, "row"), (24, "row"))  # whose things stand clear of the edges
    scenes = [make_scene(0, "test", i, layout=layout) for i, layout in chosen]
    pixels = processor.preprocess_images([scene.draw() for scene in scenes])  # (N, F, C, H, W)
    with torch.no_grad():
        latents = model.tokenize_images(model.encode_images(pixels))  # (N, n, d)
    texts = bank_texts(scenes)
    index = pad_image_index([[chunk.picture for chunk in text] for text in texts])  # (B, T_img)
    # The model takes them: an index beyond the bank, or a text with more <image> than pictures, would be refused.
    input_ids, _ = processor.pad([processor.encode_chunks(text, open_end=True)[0] for text in texts])
    with torch.no_grad():
        logits = model(input_ids, latents=latents, image_index=index).logits
    assert len(logits) == len(texts)

    card = Card(800, 654)
    side, table, right = 84, 236, 360  # of a picture; where the table and the texts begin
    heads = {
        26: ("bank of latents", latents),
        table - 30: ("image_index", index),
        right: ("texts: token ids", input_ids),
    }
    for x, (name, tensor) in heads.items():
        card.text(x, 616, name, 17, ha="left", va="baseline", weight="bold")
        card.text(x, 593, shape(tensor), 16, ha="left", va="baseline")
    places = []  # where the arrows reach each picture
    for i, scene in enumerate(scenes):
        y = 474 - 120 * i
        card.picture(40, y, side, scene.draw())
        card.cells(40, y - 18, latents.shape[1], TRAINED[1], (side / latents.shape[1], 13))
        card.axes.add_patch(plt.Circle((40, y + side), 13, fc=PICTURE_COLORS[i], ec="white", lw=1.4, zorder=3))
        card.text(40, y + side - 1, str(i), 16, "white", weight="bold", zorder=4)
        places.append((40 + side + 4, y + side / 2))

    y, rows = 572, []
    titles = {0: "five captions of one picture", 5: "a prompt with two examples", 6: "a prompt with one"}
    for i, text in enumerate(texts):
        if i in titles:
            y -= 24
            card.text(right, y, titles[i], 15, SOFT, ha="left")
            y -= 14
        lines = [(c.picture, part) for c in text for part in (textwrap.wrap(c.caption, 38) or ["…"])]
        height = max(46, 21 * len(lines) + 8)
        rows.append(y - height / 2)
        for k, (picture, words) in enumerate(lines):
            at = rows[-1] + 21 * ((len(lines) - 1) / 2 - k)
            if k == 0 or len(text) > 1:
                card.text(right, at, WORDS, 15, PICTURE_COLORS[picture], ha="left", weight="bold")
            card.text(right + 84, at, words, 15, ha="left")
        for k, chunk in enumerate(text):
            start = (table - 6, rows[-1] + 7 * ((len(text) - 1) / 2 - k))
            card.arrow(start, places[chunk.picture], color=PICTURE_COLORS[chunk.picture])
        y -= height
    index_matrix(card, index, table, rows)
    card.text(table, rows[-1] - 44, "-1: an empty slot", 15, SOFT, ha="left")
    uses = int((index >= 0).sum())
    card.text(400, 30, f"{len(scenes)} pictures encoded, each once; looked at {uses} times", 17, weight="bold")
    card.save(path)
