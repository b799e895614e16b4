"""How one of several captions is chosen: by what they have in common, and by what training captions say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize, one_hot

from flamingo.evaluation import captioning, consensus
from flamingo.evaluation.consensus import CaptionIndex, Judges, choose_captions
from flamingo.evaluation.metrics import cider_d
from flamingo.evaluation.ptb import ptb_tokens
from flamingo.evaluation.test_set import Item

DOGS = ["a brown dog runs on grass", "two dogs play on green grass"], ["a dog runs over the grass", "a dog outside"]
CAPTIONS = [*DOGS, ["a red car in a street"], ["a boat on the sea"], ["people sit at a table"]]
SUPPORT = [Item(Image.new("RGB", (8, 8)), "", captions, "1") for captions in CAPTIONS]
VECTORS = one_hot(torch.arange(5), 6).float()
VECTORS[:, 5] = torch.tensor([1.0, 0.8, 0.1, 0.0, 0.1])  # how much of a dog is in it
VECTORS = normalize(VECTORS, dim=-1)
DOG = normalize(torch.tensor([0.3, 0, 0, 0, 0, 1.0]), dim=-1)


@pytest.fixture
def judges() -> Judges:
    return Judges(SUPPORT, VECTORS)


def one_by_one(text: str, picture: int) -> float:
    """Its CIDEr-D there by the metric itself: the n-grams' weights are those of the whole support."""
    references = [[ptb_tokens(text) for text in texts] for texts in CAPTIONS]
    return cider_d([ptb_tokens(text)] * len(references), references)[picture]


def test_the_index_gives_the_metric_of_every_picture_at_once():
    index = CaptionIndex(CAPTIONS)
    for text in ("a dog runs on the grass", "a dog a dog a dog", "a boat", "unheard of", ""):
        right = [one_by_one(text, picture) for picture in range(len(CAPTIONS))]
        np.testing.assert_allclose(index.cider_d(text), right, atol=1e-6)


def test_no_caption_is_its_own_judge():
    sea = CaptionIndex([*CAPTIONS[:3], ["a boat on the sea", "a boat at sea"], CAPTIONS[4]])
    other = sea.cider.alike(*(sea.cider.weigh(ptb_tokens(text)) for text in ("A boat on the sea.", "a boat at sea")))
    assert sea.cider_d("A boat on the sea.")[3] == pytest.approx(other)
    alone = CaptionIndex(CAPTIONS).cider_d("a boat on the sea")  # nothing is left: the picture says nothing
    assert alone[3] == pytest.approx(np.delete(alone, 3).mean())


def test_what_is_often_said_is_not_the_worse_for_it():
    """Of twenty cats that are called the same and one that is not, the usual name is expected to earn most."""
    texts = [*([["a cat"]] * 20), ["a small cat on a sofa"], *([["a dog"]] * 20)]
    support = [Item(Image.new("RGB", (8, 8)), "", captions, "1") for captions in texts]
    cats = torch.tensor([[1.0, 0.1 * (i % 3)] for i in range(21)])
    judges = Judges(support, normalize(torch.cat([cats, cats[:20].flip(1)]), dim=-1))
    assert judges.best(judges.weights(normalize(torch.tensor([1.0, 0.1]), dim=0)), 1) == ["a cat"]


def test_a_channel_that_never_changes_does_not_drown_the_others():
    torch.manual_seed(0)
    vectors = torch.randn(40, 12)
    vectors[:, 5] = 0
    support = [Item(Image.new("RGB", (8, 8)), "", [f"a thing of kind {i}"], "1") for i in range(40)]
    traced = vectors[7].clone()
    traced[5] = 0.01
    judges = Judges(support, vectors)
    np.testing.assert_allclose(judges.weights(traced), judges.weights(vectors[7]), atol=0.02)


def test_weights_are_those_of_a_ridge_regression(judges):
    """Whatever is asked of the pictures: here one number of each, found by the textbook's normal equations."""
    asked = torch.tensor([3.0, -1.0, 0.5, 2.0, 0.0], dtype=torch.float64)

    def seen(vectors):
        return normalize((vectors - VECTORS.mean(dim=0)) / (VECTORS.std(dim=0, correction=0) + 1e-6), dim=-1).double()

    x, new = seen(VECTORS), seen(DOG)
    slopes = torch.linalg.solve(x.T @ x + consensus.RIDGE * torch.eye(6), x.T @ (asked - asked.mean()))
    weights = judges.weights(DOG)
    assert weights @ asked.numpy() == pytest.approx((asked.mean() + new @ slopes).item(), abs=1e-5)
    assert weights.sum() == pytest.approx(1) and weights.argmax() == 0


def test_the_best_captions_are_those_of_which_most_is_expected(judges):
    weights = judges.weights(DOG)
    best = judges.best(weights, 4)
    expected = judges.expected(weights, best)
    assert sorted(best) == sorted([*DOGS[0], *DOGS[1]]) and sorted(expected, reverse=True) == expected.tolist()
    assert judges.best(weights, 1) == best[:1] and len(judges.best(weights, 100)) == 7  # all there are
    alone = Judges(SUPPORT[:1], VECTORS[:1])
    assert alone.best(alone.weights(DOG), 2) == DOGS[0]  # a set of one picture


@pytest.mark.parametrize("unlikely, chosen", [
    (None, "a dog runs on the grass"),  # the training captions' words about what the model says too
    ("a dog runs on the grass", "a brown dog runs on grass"),  # and where the model is sure that it is not so
])  # fmt: skip
def test_expectation_and_likelihood_choose_together(judges, unlikely, chosen):
    nats = {"a dog runs on the grass": -6.0, "a brown dog runs on grass": -9.0}

    class Stub:
        pooled = torch.stack([torch.zeros(6), DOG])

        def predict(self, texts, title):
            return ["a cat"] * len(texts)

        def draw(self, texts, count, temperature, title):
            return [["a dog runs on the grass", "a cat"]] * len(texts)

        def choose(self, texts, answers, title):
            assert len(texts) == 1 and len(set(answers)) == len(answers) and texts[0][0].picture == 1
            return torch.tensor([[-200.0 if text == unlikely else nats.get(text, -40.0) for text in answers]])

    assert choose_captions(Stub(), judges, [1], [SUPPORT[0]], "captioning") == [chosen]


def test_of_several_drawn_candidates_the_most_typical_is_given(monkeypatch):
    """`--candidates 3`: three texts of each prompt, in the prompts' order, and the one most like the others."""
    said = ["a dog", "a dog runs", "a house", "the sea", "a red boat", "a boat"]
    asked = {}

    def one_batch(processor, latents, texts, batch_size, progress, answer, shared):
        return answer(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), {})

    def generate(ids, mask, **options):
        asked.update(options)
        return torch.zeros(len(said), 5)

    monkeypatch.setattr(captioning, "_in_batches", one_batch)
    model = SimpleNamespace(generate=generate, parameters=lambda: iter(()))
    processor = SimpleNamespace(decode_captions=lambda ids, start: said)
    how = captioning.Decoding(candidates=3)
    assert captioning.continue_texts(model, processor, None, [[], []], decoding=how) == ["a dog", "a red boat"]
    assert (asked["do_sample"], asked["num_return_sequences"]) == (True, 3)
    drawn = captioning.draw_texts(model, processor, None, [[], []], 3, temperature=0.9)
    assert drawn == [said[:3], said[3:]] and asked["temperature"] == 0.9
