"""What train.py says at its end: how many captions are right, or plainly that the model does not look."""

from contextlib import nullcontext

import pytest
import torch
from PIL import Image

from flamingo.classroom.examples import ClassroomScenes
from flamingo.data.chunks import Chunk
from flamingo.evaluation import first_look as module
from flamingo.evaluation.first_look import first_look, validation_items
from flamingo.files import asset
from flamingo.training.checkpoint import load_model


@pytest.fixture(scope="module")
def trained():
    return load_model(asset("classroom/flamingo"))


class Captioned:
    """Four plain pictures with the captions a classroom model gives or does not give."""

    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def texts(self, i):
        return [[Chunk(0, "", c)] for c in self.captions[i]]

    def numbers(self, i):
        return slice(i, i + 1)

    def picture(self, i):
        return Image.new("RGB", (96, 96), (60 * i, 80, 20))


def test_the_trained_classroom_model_looks(trained):
    model, processor, _ = trained
    look = first_look(model, processor, validation_items(ClassroomScenes("validation"), 0), nullcontext)
    right = round(look.facts["own"] * 64)
    assert look.looks and right >= 58 and look.facts["blind"] < 0.1 and look.facts["n"] == 64
    assert look.sentence.startswith(f"{right} of 64 validation captions are exactly right, ")


def test_closed_gates_are_no_better_than_blind_and_that_is_said(trained, monkeypatch):
    monkeypatch.setattr(module, "PICTURES", 8)
    model, processor, _ = trained
    gates = [p for name, p in model.named_parameters() if name.endswith("attn_gate")]
    values = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        try:
            for gate in gates:
                gate.zero_()
            look = first_look(model, processor, validation_items(ClassroomScenes("validation"), 0), nullcontext)
        finally:
            for gate, value in zip(gates, values, strict=True):
                gate.copy_(value)
    assert not look.looks and look.facts["own"] == look.facts["blind"]
    assert look.sentence.startswith("NOT a model that looks: ") and look.sentence.endswith("in README.md")


def test_a_captioned_set_is_scored_beside_another_picture(trained):
    model, processor, _ = trained
    sets = Captioned([["a red cat", "a cat"], ["a dog on grass"], ["two birds"], ["a boat at sea"]])
    look = first_look(model, processor, validation_items(sets, 0), nullcontext)
    assert look.facts["metric"] == "cider_d" and "for their own pictures" in look.sentence and not look.looks


def test_few_pictures_prove_neither(trained, monkeypatch):
    """One of four captions right with its picture, none without: better, but no more than chance may be."""
    model, processor, _ = trained
    said = {True: ["a house"] * 4, False: ["a red cat", *["a house"] * 3]}
    monkeypatch.setattr(module, "own_captions", lambda *how: said[how[-1] is True])
    items = validation_items(Captioned([["a red cat"], ["a dog on grass"], ["two birds"], ["a boat at sea"]]), 0)
    items.sort(key=lambda item: item.truths[0] != "a red cat")
    look = first_look(model, processor, items, nullcontext)
    assert not look.looks and "NOT" not in look.sentence and "4 pictures are too few to tell" in look.sentence
    said[False] = said[True]
    assert first_look(model, processor, items, nullcontext).sentence.startswith("NOT a model that looks: ")


def test_only_a_picture_that_stands_first_counts(trained):
    model, processor, _ = trained
    assert validation_items(Captioned([[], []]), 0) == []
    assert first_look(model, processor, validation_items(Captioned([[], []]), 0), nullcontext) is None
