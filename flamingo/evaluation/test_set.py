"""The test set: pictures with their right captions, and a pool of pictures to give as examples.

What this file teaches: a test set has three parts that must not mix. The *items* are scored; *novel* items (classroom
only) show things that training never showed; *support* pictures come from the training split and are only ever shown
as solved examples.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from flamingo.classroom import scenes
from flamingo.config import TrainingOptions
from flamingo.data.answer_columns import (
    AnswerColumns,
    Question,
    class_names,
    each_name_in_turn,
    find_answer_columns,
    labels_of,
    questions_of_row,
)
from flamingo.data.captions import CaptionedPictures, describe_splits, load_set
from flamingo.data.chunks import Chunk
from flamingo.errors import InputError

SUPPORT = 512  # pictures to draw examples from, at most; OpenFlamingo draws from 2048
FEW_SUPPORT = 64  # a small test set of n items has n of them, but at least so many


def support_size(n: int) -> int:
    """How many pictures to draw examples from, for a test set of n items."""
    return min(SUPPORT, max(FEW_SUPPORT, n))


@dataclass(frozen=True)
class Item:
    """A picture, its prompt, the captions that are right, and its group in the table.

    open: reads or draws the picture, each time it is needed: a thousand photographs held at once are 9 GB.
    scene: what is drawn, for a classroom picture. style: that of its caption. questions, label: what a captioned set
    asks about the picture, and its class name.
    """

    open: Callable[[], Image.Image]
    prompt: str
    truths: Sequence[str]
    group: str
    scene: scenes.Scene | None = None
    style: str = ""
    questions: Sequence[Question] = ()
    label: str | None = None

    @property
    def picture(self) -> Image.Image:
        return self.open()

    @property
    def captioned_by_class(self) -> bool:
        """Its caption is nothing but its class name."""
        return self.label is not None and list(self.truths) == [self.label]

    def caption_in(self, style: str) -> str:
        """A right caption: in a style if we know what is drawn, else the first that people wrote."""
        return self.scene.caption(style) if self.scene else self.truths[0]


@dataclass(frozen=True)
class EvaluationSet:
    """Items to score, novel items (none for a captioned set), and support pictures. source: for the report.

    names: all class names, if a captioned set has labels. left_out: unusable questions about its items; None: it has no
    columns of questions.
    """

    source: str
    split: str
    items: list[Item]
    novel: list[Item]
    support: list[Item]
    classroom: bool = False
    names: Sequence[str] = ()
    left_out: int | None = None

    def fingerprint(self) -> str:
        """16 hex digits that change when a caption, a prompt, a question or a class of the test set does."""
        words = [
            (item.prompt, *item.truths, item.questions, item.label)
            for item in (*self.items, *self.novel, *self.support)
        ]
        return hashlib.sha256(repr((words, self.names)).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------- classroom
def classroom_items(split: str, n: int, seed: int) -> list[Item]:
    """n scenes of a split, which no other split shares; the style goes round and is named by its cue. Grouped by number
    of objects."""
    items = []
    for i in range(n):
        scene = scenes.make_scene(seed, split, i)
        style = scenes.STYLES[i % len(scenes.STYLES)]
        count = str(len(scene.objects))
        items.append(Item(scene.draw, scenes.CUES[style], [scene.caption(style)], count, scene, style))
    return items


def classroom_test_set(split: str | None, n: int, seed: int) -> EvaluationSet:
    """Raises InputError for a split the classroom has not got."""
    split = split or "test"
    if split not in scenes.SPLITS:
        raise InputError(f"the classroom has no split {split!r}: choose one of {', '.join(scenes.SPLITS)}")
    items = classroom_items(split, n, seed)
    novel = classroom_items("novel", max(2, n // 2), seed)
    # Numbers that no item has, should somebody score the training split.
    support = [scenes.make_scene(seed, "train", 2**42 + i) for i in range(support_size(n))]
    shown = [Item(scene.draw, "", [scene.caption(scenes.STYLES[0])], "", scene) for scene in support]
    return EvaluationSet("the classroom", split, items, novel, shown, classroom=True)


def one_word_scenes(split: str, n: int, seed: int) -> list[scenes.Scene]:
    """n scenes of a split that have a left and a right, none of them among the items."""
    rng = random.Random(f"one word {seed}")
    return [scenes.make_scene(seed, split, 2**43 + i, layout=rng.choice(scenes.RULE_LAYOUTS)) for i in range(n)]


# ------------------------------------------------------------------------------------------------- captioned set
def _captions(texts: Sequence[Sequence[Chunk]]) -> list[str]:
    """The captions of the first picture. Of a document, what follows an uncaptioned picture may be about another."""
    return [chunk.caption for text in texts for chunk in text if chunk.picture == 0 and chunk.caption]


def _items(examples: CaptionedPictures, indices: Sequence[int], columns: AnswerColumns) -> tuple[list[Item], int]:
    """Examples whose first picture has a caption → items, and how many questions about them cannot be used."""
    labels = labels_of(examples.rows, columns.label) if columns.label else None
    items, left_out = [], 0
    for i in indices:
        questions, unusable = questions_of_row(examples.row(i), columns)
        left_out += unusable
        label = labels[examples.kept[i]] if labels else None
        pictures, truths = examples.numbers(i), _captions(examples.texts(i))
        group, first = str(pictures.stop - pictures.start), partial(examples.picture, pictures.start)
        items.append(Item(first, "", truths, group, questions=tuple(questions), label=label))
    return items, left_out


def captioned_test_set(
    options: TrainingOptions, split: str | None, n: int, seed: int, named: AnswerColumns | None = None,
    support: int | None = None,
) -> EvaluationSet:  # fmt: skip
    """At most n pictures of a split of the set `options.data`: test, else validation, if none is named.

    named: columns of questions, answers and labels that cannot be found by name. support: so many training pictures at
    most; None: as many as examples are drawn from. Labelled pictures come every class in
    turn. Raises InputError for a split that does not exist, fewer than 2 pictures, or a picture nobody captioned.
    """
    named = named or AnswerColumns()
    splits = load_set(options, named)
    chosen = split or ("test" if "test" in splits else "validation")
    if chosen not in splits:
        raise InputError(f"{options.data} has no split {chosen!r}: it has {', '.join(splits)}")
    examples = splits[chosen]
    if examples.without_caption:
        raise InputError(
            f"{len(examples.without_caption)} picture(s) of {examples.where} have no reference caption (the first: "
            f"{examples.without_caption[0]}): caption them or take them out, a score needs something to compare with"
        )
    print(describe_splits(splits))
    order, names = [i for i in range(len(examples)) if _captions(examples.texts(i))], []
    if len(order) < len(examples):
        print(f"{len(examples) - len(order)} document(s) are not scored: their first picture has no caption of its own")
    if len(order) < 2:
        raise InputError(
            f"{options.data} has {len(order)} {chosen} picture with a caption: the shuffled control needs at least 2, "
            "CIDEr-D too"
        )
    train, source = splits["train"], str(options.data)
    columns = find_answer_columns(examples.rows, source, named)
    if columns.label:
        labels = labels_of(examples.rows, columns.label)
        order = [order[k] for k in each_name_in_turn([labels[examples.kept[i]] for i in order])]
        names = class_names([examples.rows, train.rows], columns.label)
    # A set of one split is its own training split, and so is --split train: half of it is scored, the other half gives
    # the examples.
    shared = set(examples.kept) & set(train.kept) if train.fingerprint == examples.fingerprint else set()
    chosen_items = order[: min(n, max(2, len(order) // 2))] if shared else order[:n]
    asked = {examples.kept[i] for i in chosen_items} if shared else set()
    others = [i for i in range(len(train)) if train.kept[i] not in asked and _captions(train.texts(i))]
    items, left_out = _items(examples, chosen_items, columns)
    drawn = random.Random(f"support {seed}").sample(others, min(support or support_size(n), len(others)))
    support, _ = _items(train, drawn, columns)
    return EvaluationSet(
        source, chosen, items, [], support, names=names, left_out=left_out if columns.question else None,
    )  # fmt: skip
