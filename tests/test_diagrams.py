"""Diagrams are drawn from the model: what they show is what the code does."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import IMAGE, tiny_flamingo
from PIL import Image

from flamingo.classroom.scenes import make_scene
from flamingo.data.processor import pad_image_index
from flamingo.figures import diagrams, picture_diagrams
from flamingo.figures.drawing import PICTURE_COLORS, TRAINED, Card
from flamingo.figures.run_figures import plt


def test_the_mask_that_is_drawn_is_that_of_the_model():
    _, axes = plt.subplots()
    words = ["my", "friends:", "<image>", "a", "cat", "<image>", "a", "dog"]
    seen = diagrams.mask_panel(axes, words)
    assert seen.tolist() == [[False, False]] * 2 + [[True, False]] * 3 + [[False, True]] * 3
    filled = [patch for patch in axes.patches if patch.get_facecolor()[:3] != plt.matplotlib.colors.to_rgb("#f3f4f6")]
    assert len(filled) == int(seen.sum())
    assert [text.get_text() for text in axes.texts[: len(words)]] == words


def test_one_picture_and_words_before_it():
    _, axes = plt.subplots()
    assert diagrams.mask_panel(axes, ["look:", "<image>", "a", "cat"]).tolist() == [[False], [True], [True], [True]]


def test_shapes_are_read_off_the_running_model_and_the_hooks_are_gone_afterwards():
    model = tiny_flamingo()
    run = lambda: model(torch.tensor([[2, IMAGE, 5]]), pixel_values=torch.randn(1, 1, 1, 3, 8, 8))  # noqa: E731
    seen = diagrams.observed_shapes(model, run, encoder=model.vision_encoder, resampler=model.perceiver)
    assert seen == {"encoder": "(1, 4, 12)", "resampler": "(1, 3, 12)"}
    assert not model.perceiver._forward_hooks


def fills(card: Card, color: str) -> int:
    """How many patches of the card are filled with a colour."""
    return sum(patch.get_facecolor()[:3] == plt.matplotlib.colors.to_rgb(color) for patch in card.axes.patches)


@pytest.mark.parametrize("frames", [1, 2])
def test_a_cell_is_drawn_for_each_key_the_resampler_makes(frames):
    resampler, features = tiny_flamingo().perceiver, torch.randn(1, frames, 4, 12)  # (N, F, v, d)
    made = {}
    hook = resampler.layers[0][0].to_kv.register_forward_hook(lambda module, given, out: made.update(keys=out.shape[1]))
    out = resampler(features)
    hook.remove()
    card = Card(800, 100)
    keys, end = picture_diagrams.key_list(card, resampler, features, 10, 10)
    assert keys.shape[2] == made["keys"] == frames * 4 + 3 and out.shape == (1, 3, 12)
    assert [fills(card, color) for color in picture_diagrams.FRAME_COLORS[:2]] == ([4, 0] if frames == 1 else [4, 4])
    assert fills(card, TRAINED[1]) == 3
    assert end == pytest.approx(10 + 4.4 * made["keys"])


def test_the_index_that_is_drawn_is_that_of_the_texts():
    texts = picture_diagrams.bank_texts([make_scene(0, "test", i) for i in range(4)])
    index = pad_image_index([[chunk.picture for chunk in text] for text in texts])
    assert index.tolist() == [[0, -1, -1]] * 5 + [[1, 0, 2], [1, 3, -1]]
    assert len({text[0].caption for text in texts[:5]}) == 5
    card = Card(800, 400)
    picture_diagrams.index_matrix(card, index, 10, range(380, 30, -50))
    assert [text.get_text() for text in card.axes.texts if text.get_text()] == [
        str(i) for i in index.flatten().tolist()
    ]
    assert [fills(card, color) for color in PICTURE_COLORS] == [(index == i).sum() for i in range(4)]


DRAWN = [
    diagrams.architecture,
    diagrams.flamingo_layer,
    diagrams.masks,
    picture_diagrams.resampler,
    picture_diagrams.bank,
]


@pytest.mark.parametrize("draw", DRAWN)
def test_a_diagram_is_the_same_file_each_time(tmp_path, draw):
    draw(tmp_path / "drawn.svg")
    first = (tmp_path / "drawn.svg").read_bytes()
    draw(tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_bytes() == first
    assert ElementTree.fromstring(first).tag.endswith("svg")


def test_small_pictures_are_shown_with_their_titles():
    diagrams.show_pictures([Image.new("RGB", (8, 8))] * 3, ["one", "two", "a long title that is broken"], columns=2)
    axes = plt.gcf().axes
    assert [a.get_title() for a in axes[:2]] == ["one", "two"] and "\n" in axes[2].get_title()
    diagrams.show_maps(Image.new("RGB", (8, 8)), torch.rand(3, 2, 2))
    assert len([a for a in plt.gcf().axes if a.images]) == 3
    plt.close("all")
