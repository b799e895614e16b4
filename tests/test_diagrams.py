"""Diagrams are drawn from the model: what they show is what the code does."""

import xml.etree.ElementTree as ElementTree

import torch
from conftest import IMAGE, tiny_flamingo
from PIL import Image

from flamingo import diagrams
from flamingo.figures import plt


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


def test_a_diagram_is_the_same_file_each_time(tmp_path):
    diagrams.masks(tmp_path / "masks.svg")
    first = (tmp_path / "masks.svg").read_bytes()
    diagrams.masks(tmp_path / "masks.svg")
    assert (tmp_path / "masks.svg").read_bytes() == first
    assert ElementTree.fromstring(first).tag.endswith("svg")


def test_small_pictures_are_shown_with_their_titles():
    diagrams.show_pictures([Image.new("RGB", (8, 8))] * 3, ["one", "two", "a long title that is broken"], columns=2)
    axes = plt.gcf().axes
    assert [a.get_title() for a in axes[:2]] == ["one", "two"] and "\n" in axes[2].get_title()
    diagrams.show_maps(Image.new("RGB", (8, 8)), torch.rand(3, 2, 2))
    assert len([a for a in plt.gcf().axes if a.images]) == 3
    plt.close("all")
