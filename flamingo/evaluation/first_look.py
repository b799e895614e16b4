"""The last thing train.py does: caption 64 validation pictures and report in a sentence whether the model looks.

What this file teaches: "done" is not a result. A run may end with a low loss and captions that are nonsense, or with
captions that would be the same without the picture. So each of the 64 is captioned twice, with its picture and with
none; in the classroom, where one caption is right, the right ones are counted, elsewhere CIDEr-D shows how much closer
a caption is to its own picture's references than to another's. (evaluate.py does all of this thoroughly.)
"""

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from flamingo.classroom.examples import ClassroomScenes
from flamingo.data.processor import FlamingoProcessor
from flamingo.evaluation.captioning import caption, encode_pictures
from flamingo.evaluation.metrics import bootstrap_interval, cider_d, exact_match
from flamingo.evaluation.ptb import ptb_tokens
from flamingo.evaluation.test_set import Item, classroom_items
from flamingo.model.vlm import Flamingo

PICTURES = 64
READ_ON = 'see "Troubleshooting" in README.md'


@dataclass(frozen=True)
class FirstLook:
    """looks: better with the picture than without by more than chance. sentence: for the terminal. facts: for
    summary.json."""

    looks: bool
    sentence: str
    facts: dict


def validation_items(examples: Dataset, seed: int) -> list[Item]:
    """At most `PICTURES` validation pictures with the captions that are right."""
    if isinstance(examples, ClassroomScenes):
        return classroom_items("validation", PICTURES, seed)
    order = random.Random(f"first look {seed}").sample(range(len(examples)), len(examples))
    items = []
    for i in order:
        example = examples[i]
        # Of a document only a picture that stands first: what follows it may belong to another one.
        truths = [text[0].caption for text in example.texts if text[0].picture == 0 and text[0].caption]
        items += [Item(example.pictures[0], "", truths, "")] if truths else []
        if len(items) == PICTURES:
            break
    return items


def first_look(
    model: Flamingo,
    processor: FlamingoProcessor,
    examples: Dataset,
    autocast: Callable[[], AbstractContextManager],
    seed: int,
) -> FirstLook | None:
    """None if no validation picture has a caption of its own."""
    items = validation_items(examples, seed)
    if len(items) < 2:
        return None
    model.eval()
    latents = encode_pictures(model, processor, [item.picture for item in items], autocast=autocast)
    prompts = [item.prompt for item in items]
    own, blind = (caption(model, processor, latents, prompts, autocast=autocast, blind=b) for b in (False, True))
    truths = [item.truths for item in items]
    if isinstance(examples, ClassroomScenes):
        marks, marks_blind = exact_match(own, truths), exact_match(blind, truths)
        score = f"{int(marks.sum())} of {len(items)} validation captions are exactly right"
        beside = f"{int(marks_blind.sum())} without the picture"
        metric = "exact match"
    else:
        marks, marks_blind, other = (_cider(*pair) for pair in ((own, truths), (blind, truths), (own, _next(truths))))
        score = f"{len(items)} validation captions score CIDEr-D {marks.mean():.3f} for their own pictures"
        beside = f"{other.mean():.3f} for another's, {marks_blind.mean():.3f} without any"
        metric = "CIDEr-D"
    low, _ = bootstrap_interval(marks - marks_blind, seed=0)
    looks = bool(low > 0)
    sentence = f"{score}, {beside}"
    if not looks:
        sentence = f"NOT a model that looks: {sentence}, so its captions are no better than blind; {READ_ON}"
    facts = {"n": len(items), "metric": metric, "own": float(marks.mean()), "blind": float(marks_blind.mean())}
    return FirstLook(looks, sentence, facts | {"looks": looks})


def _cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    return cider_d([ptb_tokens(text) for text in captions], [[ptb_tokens(t) for t in texts] for texts in references])


def _next(truths: list) -> list:
    return truths[1:] + truths[:1]
