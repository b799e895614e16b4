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
from functools import partial

import numpy as np
from torch.utils.data import Dataset

from flamingo.classroom.examples import ClassroomScenes
from flamingo.data.processor import FlamingoProcessor
from flamingo.evaluation.captioning import caption, encode_pictures
from flamingo.evaluation.confusions import confusion_table, confusions
from flamingo.evaluation.metrics import bootstrap_interval, cider_d, exact_match
from flamingo.evaluation.ptb import ptb_tokens
from flamingo.evaluation.test_set import Item, classroom_items
from flamingo.model.vlm import Flamingo

PICTURES = 64
WELL_LEARNED = 0.95  # share of right captions below which the end of a run names what is confused
Context = Callable[[], AbstractContextManager]  # makes the context that sets the precision
READ_ON = 'see "Troubleshooting" in README.md'


@dataclass(frozen=True)
class FirstLook:
    """looks: better with the picture than without it by more than chance, and, on a captioned set, a better match for
    its own picture than for another's. sentence: for the terminal. facts: for summary.json."""

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
        # Of a document only a picture that stands first: what follows it may belong to another one.
        truths = [text[0].caption for text in examples.texts(i) if text[0].picture == 0 and text[0].caption]
        items += [Item(partial(examples.picture, examples.numbers(i).start), "", truths, "")] if truths else []
        if len(items) == PICTURES:
            break
    return items


def own_captions(
    model: Flamingo, processor: FlamingoProcessor, items: Sequence[Item], autocast: Context, blind: bool = False
) -> list[str]:
    """A caption for each item, with its picture, or with none (blind)."""
    latents = encode_pictures(model, processor, [item.open for item in items], autocast=autocast)
    return caption(model, processor, latents, [item.prompt for item in items], autocast=autocast, blind=blind)


def marks_of(items: Sequence[Item], captions: Sequence[str]) -> tuple[str, np.ndarray]:
    """The name of the score that fits these items, and each caption's (N,): exact match where one caption is right, in
    the classroom; CIDEr-D where people wrote several."""
    truths = [item.truths for item in items]
    return ("exact_match", exact_match(captions, truths)) if items[0].scene else ("cider_d", _cider(captions, truths))


def first_look(
    model: Flamingo, processor: FlamingoProcessor, items: Sequence[Item], autocast: Context
) -> FirstLook | None:
    """None if there are too few items: no validation picture has a caption of its own."""
    if len(items) < 2:
        return None
    model.eval()
    own, blind = (own_captions(model, processor, items, autocast, blind) for blind in (False, True))
    (metric, marks), (_, marks_blind) = marks_of(items, own), marks_of(items, blind)
    if metric == "exact_match":
        controls = [marks_blind]
        score = f"{int(marks.sum())} of {len(items)} validation captions are exactly right"
        beside = f"{int(marks_blind.sum())} without the picture"
    else:
        other = _cider(own, _next([item.truths for item in items]))
        controls = [marks_blind, other]
        score = f"{len(items)} validation captions score CIDEr-D {marks.mean():.3f} for their own pictures"
        beside = f"{other.mean():.3f} for another's, {marks_blind.mean():.3f} without any"
    looks = all(bootstrap_interval(marks - control, seed=0)[0] > 0 for control in controls)
    sentence = f"{score}, {beside}"
    if not looks and len(items) < PICTURES and all(marks.mean() > control.mean() for control in controls):
        sentence += f" ({len(items)} pictures are too few to tell such a difference from chance: ask evaluate.py)"
    elif not looks:
        sentence = f"NOT a model that looks: {sentence}, so its captions do not come from the picture; {READ_ON}"
    elif metric == "exact_match" and marks.mean() < WELL_LEARNED:
        found = confusions([item.scene for item in items], [item.truths[0] for item in items], own)
        sentence += f"\nnot all is learned; still confused:\n{confusion_table(found)}"
    facts = {"n": len(items), "metric": metric, "own": float(marks.mean()), "blind": float(marks_blind.mean())}
    return FirstLook(looks, sentence, facts | {"looks": looks})


def _cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    return cider_d([ptb_tokens(text) for text in captions], [[ptb_tokens(t) for t in texts] for texts in references])


def _next(truths: list) -> list:
    return truths[1:] + truths[:1]
