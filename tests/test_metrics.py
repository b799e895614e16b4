"""Caption scores: equal to pycocoevalcap's (goldens/metrics.json, made by goldens/make_metric_goldens.py), and sane."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from flamingo.errors import InputError
from flamingo.evaluation.metrics import (
    bleu,
    bleu_counts,
    bleu_of_counts,
    bootstrap_interval,
    caption_metrics,
    cider_d,
    exact_match,
    mean_score,
    rouge_l,
)
from flamingo.evaluation.ptb import ptb_tokens
from flamingo.evaluation.vqa import normalise_answer, vqa_accuracies, vqa_accuracy

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "metrics.json").read_text(encoding="utf-8"))
SCORES = caption_metrics(GOLDENS["candidates"], GOLDENS["references"])
TRUTHS = [["A dog runs."], ["Two cats sleep on a red sofa.", "cats"], ["The man's hat isn't blue, it's green."]]


def words(texts):
    return [ptb_tokens(text) for text in texts]


# ------------------------------------------------------------------------------------------------- pycocoevalcap


def test_tokens_are_those_of_the_java_tokenizer():
    pairs = list(zip(GOLDENS["candidates"], GOLDENS["candidate_tokens"], strict=True))
    for texts, tokens in zip(GOLDENS["references"], GOLDENS["reference_tokens"], strict=True):
        pairs += zip(texts, tokens, strict=True)
    assert len(pairs) > 60
    assert [(text, ptb_tokens(text)) for text, _ in pairs] == [(text, tokens.split()) for text, tokens in pairs]


def test_corpus_scores_equal_pycocoevalcap():
    assert [SCORES[f"bleu_{n}"].value for n in (1, 2, 3, 4)] == pytest.approx(GOLDENS["bleu"], abs=1e-6)
    assert SCORES["cider_d"].value == pytest.approx(GOLDENS["cider_d"], abs=1e-6)
    assert SCORES["rouge_l"].value == pytest.approx(GOLDENS["rouge_l"], abs=1e-6)


def test_scores_of_each_picture_equal_pycocoevalcap():
    said, right = words(GOLDENS["candidates"]), [words(texts) for texts in GOLDENS["references"]]
    assert cider_d(said, right).tolist() == pytest.approx(GOLDENS["cider_d_per_picture"], abs=1e-6)
    assert rouge_l(said, right).tolist() == pytest.approx(GOLDENS["rouge_l_per_picture"], abs=1e-6)


# ----------------------------------------------------------------------------------------------------- identities


def test_a_caption_against_itself_has_full_marks():
    texts = ["a black dog runs over the grass", "two cats sleep on a red sofa", "the man's hat isn't blue, it's green"]
    scores = caption_metrics(texts, [[text] for text in texts])
    for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "exact_match", "distinct_captions"):
        assert scores[name].value == pytest.approx(1.0), name
    assert scores["cider_d"].value == pytest.approx(10.0)  # the upper end: papers would write 1000


def test_nothing_in_common_scores_nothing():
    scores = caption_metrics(["one two three four", "five six"], [["a b c d"], ["e f"]])
    assert all(scores[name].value < 1e-6 for name in ("bleu_1", "bleu_4", "rouge_l", "cider_d", "exact_match"))


def test_the_order_of_pictures_does_not_matter():
    order = np.random.default_rng(0).permutation(len(GOLDENS["candidates"]))
    mixed = caption_metrics([GOLDENS["candidates"][i] for i in order], [GOLDENS["references"][i] for i in order])
    assert {name: score.value for name, score in mixed.items()} == pytest.approx(
        {name: score.value for name, score in SCORES.items()}
    )


def test_the_order_of_references_does_not_matter():
    turned = caption_metrics(GOLDENS["candidates"], [texts[::-1] for texts in GOLDENS["references"]])
    assert {name: score.value for name, score in turned.items()} == pytest.approx(
        {name: score.value for name, score in SCORES.items()}
    )


def test_exact_match_ignores_case_and_spaces_only():
    said = ["a  DOG runs.", "cats", "a dog runs"]
    assert exact_match(said, [TRUTHS[0], TRUTHS[1], TRUTHS[0]]).tolist() == [1.0, 1.0, 0.0]


def test_a_model_that_always_says_the_same_is_seen():
    scores = caption_metrics(["A dog.", "a dog.", "a  dog."], TRUTHS)
    assert scores["distinct_captions"].value == pytest.approx(1 / 3)
    assert scores["vocabulary"].value == 2


# ------------------------------------------------------------------------------------------------------ intervals


def test_intervals_contain_the_score_and_are_reproducible():
    again = caption_metrics(GOLDENS["candidates"], GOLDENS["references"])
    other = caption_metrics(GOLDENS["candidates"], GOLDENS["references"], seed=1)
    for name, score in SCORES.items():
        assert again[name] == score
        if score.low is None:
            assert name in ("distinct_captions", "vocabulary")
            continue
        assert score.low <= score.value <= score.high, name
        if name != "exact_match":  # no caption of the goldens matches
            assert score.low < score.high and (other[name].low, other[name].high) != (score.low, score.high)


def test_the_interval_of_a_mean_is_about_two_standard_errors():
    values = np.random.default_rng(0).normal(5.0, 2.0, size=400)
    low, high = bootstrap_interval(values, resamples=2000)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.3 * error)


def test_a_draw_of_counts_is_the_bleu_of_those_pictures():
    said, right = words(GOLDENS["candidates"]), [words(texts) for texts in GOLDENS["references"]]
    draw = [3, 3, 1, 7, 0]
    counts = bleu_counts(said, right)
    assert bleu_of_counts(counts[draw].sum(axis=0)).tolist() == pytest.approx(
        bleu([said[i] for i in draw], [right[i] for i in draw])
    )


def test_a_thousand_captions_are_scored_in_seconds():
    n = 1000
    said = [f"a {i % 7} dog and {i % 11} cats on the grass number {i}" for i in range(n)]
    right = [[f"{i % 5} dogs and cats {i} on the grass" for _ in range(5)] for i in range(n)]
    start = time.process_time()
    scores = caption_metrics(said, right)
    assert scores["bleu_1"].n == n
    assert time.process_time() - start < 15


def test_scores_go_into_a_report():
    report = json.loads(json.dumps({name: score.to_dict() for name, score in SCORES.items()}))
    assert set(report["cider_d"]) == {"value", "low", "high", "n", "scale"}
    assert report["cider_d"]["n"] == len(GOLDENS["candidates"])
    assert "100" in report["cider_d"]["scale"]


# -------------------------------------------------------------------------------------------------------- refusals


def test_cider_of_one_picture_is_refused_and_left_out():
    with pytest.raises(InputError, match="at least 2 pictures"):
        cider_d([["a", "dog"]], [[["a", "dog"]]])
    with pytest.warns(UserWarning, match="cider_d is left out"):
        scores = caption_metrics(["a dog"], [["a dog"]])
    assert "cider_d" not in scores and scores["bleu_1"].value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("said", "right", "sentence"),
    [
        (["a", "b"], [["a"]], "2 captions, but references of 1 pictures"),
        (["a", "b"], [["a"], []], "picture 1 has no reference"),
        (["a", "b"], ["a", "b"], "give a list of texts"),
        ([], [], "no caption to score"),
    ],
)
def test_captions_without_references_are_refused(said, right, sentence):
    with pytest.raises(InputError, match=sentence):
        caption_metrics(said, right)


# ------------------------------------------------------------------------------------------------------------- VQA


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The red  Ball.", "red ball"),
        ("Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("black/white", "black white"),  # no space beside the sign: it becomes one
        ("black / white", "black white"),  # a space beside it: it goes
        ("yes, it is!", "yes it is"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("t-shirt", "t shirt"),
        ("an", ""),
    ],
)
def test_answers_are_normalised(answer, normal):
    assert normalise_answer(answer) == normal


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_vqa_rule(same, accuracy):
    """k of 10 gave the answer: left out are k times one of them, and 10 - k times another.
    (k·min((k-1)/3, 1) + (10-k)·min(k/3, 1)) / 10: 1 → 9/30, 2 → (2·1 + 8·2)/30, 3 → (3·2 + 7·3)/30, 4 → 1."""
    humans = ["Red."] * same + [f"other {i}" for i in range(10 - same)]
    answer = "Red." if same == 10 else "the red"  # where all people agree nothing is normalised
    assert vqa_accuracies([answer], [humans]) == pytest.approx([accuracy])


def test_vqa_where_all_agree_takes_the_answer_as_it_is():
    assert vqa_accuracies(["2", "two"], [["2"] * 10] * 2).tolist() == [1.0, 0.0]
    assert vqa_accuracies(["two"], [["2"] * 9 + ["3"]]).tolist() == [1.0]


def test_vqa_score_has_an_interval_over_questions():
    score = vqa_accuracy(["yes", "no", "yes"], [["yes"] * 10, ["yes"] * 10, ["yes"] * 3 + ["no"] * 7])
    assert score.value == pytest.approx((1 + 0 + 0.9) / 3) and score.n == 3
    assert score.low <= score.value <= score.high
    assert score == mean_score(np.array([1.0, 0.0, 0.9]), score.scale)


@pytest.mark.parametrize(
    ("answers", "humans", "sentence"),
    [
        (["yes"], [], "1 answers, but human answers to 0 questions"),
        (["yes"], [["yes"]], "fewer than 2 human answers"),
        (["yes"], ["yes"], "fewer than 2 human answers"),
        ([], [], "no answer to score"),
    ],
)
def test_vqa_without_human_answers_is_refused(answers, humans, sentence):
    with pytest.raises(InputError, match=sentence):
        vqa_accuracies(answers, humans)
