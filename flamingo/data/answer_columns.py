"""Questions with answers, and class names, that a captioned set may bring in further columns.

What this file teaches: the few forms in which sets write these things down, brought to one. By name are found

    question(s), answer(s)    a question and its answer; or what several people answered, as texts or as VQAv2 writes
                              them ({"answer": "yes", …}); or lists of equal length: questions, and the answers to each
    label                     the class of the picture: a `datasets.ClassLabel` (what class folders become), or its name

Training reads none of this. A question without text, or without an answer that is text, is left out and counted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flamingo.data.places import shown
from flamingo.errors import InputError

QUESTION_NAMES, ANSWER_NAMES, LABEL_NAMES = ("question", "questions"), ("answers", "answer"), ("label", "labels")


def question_prompt(question: str) -> str:
    """The prompt after <image>: the form that the classroom trains."""
    return f"Question: {question} Answer:"


@dataclass(frozen=True)
class Question:
    """A question about a picture, and what each annotator answered (at least one)."""

    text: str
    answers: tuple[str, ...]

    @property
    def answer(self) -> str:
        """What most people answered; of equals the first."""
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True)
class AnswerColumns:
    """Which columns hold these things; None: not named, or there is none."""

    question: str | None = None
    answer: str | None = None
    label: str | None = None


# ------------------------------------------------------------------------------------------------- columns
def find_answer_columns(split, source: str, named: AnswerColumns) -> AnswerColumns:
    """The columns of a `datasets.Dataset`: those named, else by name. Questions come with answers or not at all.

    Raises InputError for a column that does not exist, questions without answers, or labels that are no class names.
    """
    have = list(split.column_names)
    for name in (named.question, named.answer, named.label):
        if name and name not in have:
            raise InputError(f"{shown(source)} has no column {shown(name)!r}: it has {', '.join(map(shown, have))}")
    if named.label and not _holds_names(split.features[named.label]):
        raise InputError(f"{source}: column {named.label!r} holds no class names: it must be text or a ClassLabel")

    def find(names: Sequence[str]) -> str | None:
        return next((column for name in names for column in have if column.lower() == name), None)

    question, answer = named.question or find(QUESTION_NAMES), named.answer or find(ANSWER_NAMES)
    if (named.question or named.answer) and not (question and answer):
        missing = "answers" if question else "questions"
        raise InputError(
            f"{shown(source)}: none of {', '.join(map(shown, have))} looks like {missing}: name them with "
            f"--{missing[:-1]}-column"
        )
    if not (question and answer):
        question = answer = None
    label = named.label or find(LABEL_NAMES)
    if label and not _holds_names(split.features[label]):
        label = None  # numbers or lists by that name: nothing that could be a caption
    return AnswerColumns(question, answer, label)


def _holds_names(feature) -> bool:
    return hasattr(feature, "names") or getattr(feature, "dtype", None) in ("string", "large_string")


# ----------------------------------------------------------------------------------------------- questions
def _texts(value) -> list[str]:
    """Every text in an answer column's value: "yes", ["yes", "no"], [{"answer": "yes"}, …], {"answer": ["yes", …]}."""
    if isinstance(value, dict):
        return _texts(value.get("answer"))
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    return [" ".join(value.split())] if isinstance(value, str) and value.strip() else []


def questions_of_row(row: dict, columns: AnswerColumns) -> tuple[list[Question], int]:
    """The usable questions of a row, and how many were not."""
    if columns.question is None:
        return [], 0
    questions, answers = row[columns.question], row[columns.answer]
    if not isinstance(questions, (list, tuple)):
        questions, answers = [questions], [answers]
    if not questions or not isinstance(answers, (list, tuple)) or len(answers) != len(questions):
        return [], max(1, len(questions))
    pairs = [(_texts(question), _texts(answer)) for question, answer in zip(questions, answers, strict=True)]
    good = [Question(question[0], tuple(answer)) for question, answer in pairs if question and answer]
    return good, len(pairs) - len(good)


# -------------------------------------------------------------------------------------------------- labels
def _spoken(name) -> str | None:
    return " ".join(name.replace("_", " ").split()) or None if isinstance(name, str) else None


def labels_of(split, column: str) -> list[str | None]:
    """The class name of each row, underscores turned into spaces; None where it is missing."""
    names = getattr(split.features[column], "names", None)
    if names is None:
        return [_spoken(value) for value in split[column]]
    return [None if value is None or value < 0 else _spoken(names[value]) for value in split[column]]


def class_names(splits: Sequence, column: str) -> list[str]:
    """All names to choose among: those of the ClassLabel, else those that occur in the splits, by the alphabet."""
    names = getattr(splits[0].features[column], "names", None)
    found = map(_spoken, names) if names else sorted({name for s in splits for name in labels_of(s, column) if name})
    return list(dict.fromkeys(name for name in found if name))


def each_name_in_turn(labels: Sequence[str | None]) -> list[int]:
    """The places of the labels, reordered: every name once, then every name again, …; those without a name last.

    Sets of class folders stand sorted by class: their first hundred pictures would all be of one.
    """
    seen: Counter = Counter()
    turns = []
    for place, label in enumerate(labels):
        turns.append((label is None, seen[label], place))
        seen[label] += 1
    return [place for *_, place in sorted(turns)]


def with_captions_from_labels(split, source: str, named: AnswerColumns):
    """A split without a caption column, given one: the class names. Unchanged if it has no labels.

    Raises InputError if it has questions only.
    """
    columns = find_answer_columns(split, source, named)
    if columns.label:
        return split.add_column("caption", labels_of(split, columns.label))
    if columns.question:
        raise InputError(
            f"{source} has questions but no captions, and captions are scored first: add a caption column, or name one "
            "with --caption-columns"
        )
    return split
