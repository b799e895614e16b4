"""A score beside what a model would score without looking.

What this file teaches: a score alone does not show that a model looks at its picture. Beside it stand four controls,
which are given no picture or the wrong one:

    blind       the model itself, the picture taken away
    shuffled    the model itself, shown the next item's picture
    constant    the same caption for every picture: the one of the support pictures that is most like all others
    copy_demo   the caption of another picture, drawn from the support: what a model that copies its example gives

On a captioned set two more, which the encoder gives without any language model: nearest and typical (neighbours.py);
where captions of training pictures help to choose, also the best of these, consensus (consensus.py).

Only what lies above all of them was read off the picture. Whether a difference is more than chance is tested picture by
picture: score minus control, resampled (a paired bootstrap).
"""

import random
from collections.abc import Sequence

from flamingo.evaluation import neighbours
from flamingo.evaluation.consensus import Judges, choose_captions
from flamingo.evaluation.metrics import bootstrap_interval, caption_metrics, cider_d, exact_match, normalise
from flamingo.evaluation.parts import Parts
from flamingo.evaluation.predictor import Predictor
from flamingo.evaluation.ptb import ptb_tokens
from flamingo.evaluation.test_set import EvaluationSet, Item
from flamingo.evaluation.typical import most_typical

CONTROLS = ("blind", "shuffled", "constant", "copy_demo")
SHOWN_INSTEAD = {
    "blind": "no picture", "shuffled": "another's picture", "constant": "one caption for all",
    "copy_demo": "a copied example", "nearest": "the nearest picture's caption",
    "typical": "the most typical of its neighbours' captions", "consensus": "the best training caption",
}  # fmt: skip
COMPARED = 128  # captions among which the constant one is looked for: each is compared with all


def controls_of(predictions: dict[str, list[str]]) -> list[str]:
    """The controls that there are predictions of: in the classroom a neighbour's caption would mean nothing, for there
    are as many scenes as one likes."""
    return [name for name in SHOWN_INSTEAD if name in predictions]


def answer_all(
    predictor: Predictor, parts: Parts, test_set: EvaluationSet, rows: list[int], novel_rows: list[int],
    seed: int, support_rows: Sequence[int] = (),
) -> dict[str, list[str]]:  # fmt: skip
    """{"own", "novel", and each control: its captions}. rows, …: the pictures' places in the bank (support_rows: needed
    of a captioned set)."""
    items = test_set.items
    others = rows[1:] + rows[:1]

    judges = None
    if predictor.decoding.consensus:
        judges = Judges(test_set.support, predictor.pooled[support_rows])

    def predict(pictures: Sequence[int], asked: Sequence[Item], title: str, **control) -> list[str]:
        if judges and not control:  # of a picture that is taken away nothing can be expected
            return parts.keep(title, lambda: choose_captions(predictor, judges, pictures, asked, title))
        return parts.keep(title, lambda: predictor.caption(pictures, asked, title, **control))

    def of_neighbours() -> dict[str, list[str]]:
        found = neighbours.captions_of_neighbours(
            predictor.pooled[rows], predictor.pooled[support_rows], test_set.support
        )
        if judges:
            found["consensus"] = [judges.best(judges.weights(vector), 1)[0] for vector in predictor.pooled[rows]]
        return found

    alike = {} if test_set.classroom else parts.keep("neighbours", of_neighbours)
    return alike | {
        "own": predict(rows, items, "captioning"),
        "novel": predict(novel_rows, test_set.novel, "captioning novel") if test_set.novel else [],
        "blind": predict(rows, items, "blind", blind=True),
        "shuffled": predict(others, items, "shuffled"),
        "constant": constant_captions(test_set),
        "copy_demo": copied_captions(test_set, seed),
    }


def constant_captions(test_set: EvaluationSet) -> list[str]:
    """For each item the support caption that shares most words with others: one for all (or one a style)."""
    chosen: dict[str, str] = {}
    for style in {item.style for item in test_set.items}:
        captions = list(dict.fromkeys(item.caption_in(style) for item in test_set.support))[:COMPARED]
        chosen[style] = most_typical(captions)
    return [chosen[item.style] for item in test_set.items]


def copied_captions(test_set: EvaluationSet, seed: int) -> list[str]:
    """For each item the caption of a support picture drawn at random; never one that is the item's own."""
    predictions = []
    for i, item in enumerate(test_set.items):
        rng = random.Random(f"copy {seed} {i}")
        captions = [demo.caption_in(item.style) for demo in rng.sample(test_set.support, len(test_set.support))]
        right = set(map(normalise, item.truths))
        predictions.append(next((caption for caption in captions if normalise(caption) not in right), captions[0]))
    return predictions


def score_with_controls(test_set: EvaluationSet, predictions: dict[str, list[str]], seed: int) -> dict:
    """Keys `metrics`, `controls`, `looks`, `verdict`, `by_objects`, `novel` and the flat ones of `evaluation.json`."""
    truths = [item.truths for item in test_set.items]
    names = {"own": "exact_match", "blind": "exact_match_blind", "shuffled": "exact_match_shuffled"}
    marks = {flat: exact_match(predictions[name], truths) for name, flat in names.items()}  # (N,) each
    result = {
        "n": len(test_set.items),
        **{name: float(values.mean()) for name, values in marks.items()},
        "exact_match_novel": None,
        "by_objects": {
            group: {"n": len(which)} | {name: float(values[which].mean()) for name, values in marks.items()}
            for group, which in by_group(test_set.items).items()
        },
        "metrics": scores(predictions["own"], truths, seed),
        "controls": {name: scores(predictions[name], truths, seed) for name in controls_of(predictions)},
    }
    result |= verdict(test_set, predictions, seed)
    if test_set.novel:
        right = exact_match(predictions["novel"], [item.truths for item in test_set.novel])
        result["exact_match_novel"] = float(right.mean())
        result["novel"] = {
            "n": len(right),
            "exact_match": float(right.mean()),
            "by_objects": {
                g: {"n": len(w), "exact_match": float(right[w].mean())} for g, w in by_group(test_set.novel).items()
            },
            "metrics": scores(predictions["novel"], [item.truths for item in test_set.novel], seed),
        }
    return result


def by_group(items: Sequence[Item]) -> dict[str, list[int]]:
    """Group → the numbers of its items."""
    return {group: [i for i, item in enumerate(items) if item.group == group]
            for group in sorted({item.group for item in items})}  # fmt: skip


def scores(captions: Sequence[str], truths: Sequence[Sequence[str]], seed: int) -> dict[str, dict]:
    """Every caption metric by name, as `Score.to_dict` writes it."""
    return {name: score.to_dict() for name, score in caption_metrics(captions, truths, seed=seed).items()}


def verdict(test_set: EvaluationSet, predictions: dict[str, list[str]], seed: int) -> dict:
    """{"looks": bool, "verdict": a sentence, "gain": control → {value, low, high} of score minus control}.

    By exact match in the classroom, where there is one right caption, else (or if it is never right) by CIDEr-D.
    """
    truths, compared = [item.truths for item in test_set.items], controls_of(predictions)
    per_picture = {name: exact_match(predictions[name], truths) for name in ("own", *compared)}
    metric = "exact match"
    if not (test_set.classroom and per_picture["own"].any()):
        metric, references = "CIDEr-D", [[ptb_tokens(text) for text in texts] for texts in truths]
        per_picture = {
            name: cider_d([ptb_tokens(text) for text in predictions[name]], references) for name in per_picture
        }
    own, gain = per_picture["own"], {}
    for name in compared:
        difference = own - per_picture[name]
        low, high = bootstrap_interval(difference, seed=seed)
        gain[name] = {"value": float(difference.mean()), "low": float(low), "high": float(high)}
    above = [name for name in compared if gain[name]["low"] > 0]
    looks = "blind" in above and "shuffled" in above
    figures = ", ".join(f"{per_picture[name].mean():.3f} with {SHOWN_INSTEAD[name]}" for name in compared)
    score = f"{metric} {own.mean():.3f} with its own picture, {figures} (n = {len(own)})"
    if looks and len(above) == len(compared):
        sentence = f"It looks: {score}."
    elif looks:
        behind = " and ".join(SHOWN_INSTEAD[name] for name in compared if name not in above)
        sentence = f"It looks, but does not say more than {behind} would: {score}."
    else:
        same = " or ".join(SHOWN_INSTEAD[name] for name in ("blind", "shuffled") if name not in above)
        sentence = f"Nothing shows that it looks: it scores no better than with {same}: {score}."
    return {"looks": looks, "verdict": sentence, "gain": gain, "headline_metric": metric}
