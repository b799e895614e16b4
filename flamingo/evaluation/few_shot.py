"""Does it learn from examples? Prompts of solved examples, and what they are worth.

What this file teaches: a few-shot prompt is one document, in which each picture is followed by its text and closed
by <|endofchunk|>, and the last is left open:

    <image> Output: a dog<|endofchunk|><image> Output: two cats<|endofchunk|><image> Output:

(`Output:` is the template of the Flamingo papers for photographs, an option; models trained by train.py have none.)
A rising curve does not prove that the example *pictures* were read: the same examples without pictures and <image>
tags (`text_only_demos`) show how much came from their texts.

**0 shots** here means no example at all. The "0-shot" of the Flamingo papers shows two examples without their pictures
(zero_shot="two-texts"; also what `text_only_demos` is at 2 shots).

Examples are drawn from the training split, at random by seed, or the most similar ones (RICES, Yang et al. 2022:
nearest by the vision encoder's pooled features, the most alike last, next to the query).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flamingo.classroom import scenes
from flamingo.classroom.examples import question_chunk, rule_chunk
from flamingo.data.chunks import Chunk
from flamingo.errors import InputError
from flamingo.evaluation.metrics import bootstrap_interval, cider_d, exact_match, normalise
from flamingo.evaluation.parts import Parts
from flamingo.evaluation.predictor import Predictor
from flamingo.evaluation.ptb import ptb_tokens
from flamingo.evaluation.test_set import EvaluationSet, Item

SCORES = ("exact_match", "exact_match_novel", "text_only_demos", "cider_d", "cider_d_text_only_demos")  # of captions
TASKS = {
    "questions": "questions", "one_word": "one word, by a rule", "classification": "which one?",
    "classification_novel": "which one? (novel)",
}  # fmt: skip


@dataclass(frozen=True)
class Query:
    """A picture (row of the bank), the prompt after it, the outputs that are right, and their style."""

    row: int
    prompt: str
    truths: Sequence[str]
    style: str = ""


Score = Callable[[Sequence[str], Sequence[Query]], np.ndarray]


@dataclass(frozen=True)
class Task:
    """Queries, and the support pictures (rows of the bank) that `solve` turns into examples for a query.

    answers: to choose among (classification), or None to generate freely. chance: of guessing right, if known.
    own_answers: an output belongs to its picture alone (captions), so no example may show a right output of the query.
    Not so for questions and classification: "a dog" may be right twice.
    scores: name → what scores the predictions for the queries, (N,).
    """

    name: str
    queries: Sequence[Query]
    support: Sequence[int]
    solve: Callable[[int, Query], Chunk]
    answers: Sequence[str] | None = None
    chance: float | None = None
    own_answers: bool = False
    scores: dict[str, Score] = field(default_factory=lambda: {"exact_match": _marks})


@dataclass(frozen=True)
class FewShot:
    """How examples are chosen and shown: see evaluate.py's options of these names."""

    shots: Sequence[int]
    trials: int = 2
    demos: str = "random"
    zero_shot: str = "bare"
    seed: int = 0

    def examples_at(self, shots: int) -> int:
        """How many examples a prompt shows: `shots`, or two (without pictures) where that is what 0 means."""
        return 2 if not shots and self.zero_shot == "two-texts" else shots

    @property
    def most(self) -> int:
        """Examples of the longest prompt."""
        return max(map(self.examples_at, self.shots))


# ------------------------------------------------------------------------------------------------------- prompts
def prompt_text(query: Query, examples: Sequence[Chunk], way: str = "") -> list[Chunk]:
    """The chunks of a prompt.

    way: text_only_demos: examples keep their text and their <|endofchunk|>, not their pictures; shuffled_demos: each
    keeps its text and gets the next one's picture.
    """
    if way == "text_only_demos":
        examples = [replace(chunk, picture=None, closed=True) for chunk in examples]
    if way == "shuffled_demos":
        pictures = [chunk.picture for chunk in (*examples[1:], *examples[:1])]
        examples = [replace(chunk, picture=row) for chunk, row in zip(examples, pictures, strict=True)]
    return [*examples, Chunk(query.row, query.prompt)]


def _gives_away(task: Task, example: Chunk, right: set[str]) -> bool:
    return task.own_answers and normalise(example.caption) in right


def choose_examples(task: Task, most: int, how: FewShot, trial: int, predictor: Predictor) -> list[list[Chunk]]:
    """For each query its examples, `most` of them; for fewer shots take the last ones. The same for the same trial.

    With `own_answers` no example shows a right output of the query: another picture is taken.
    """
    chosen = []
    for i, query in enumerate(task.queries):
        if how.demos == "rices":
            similarity = predictor.pooled[list(task.support)] @ predictor.pooled[query.row]
            order = [task.support[j] for j in similarity.argsort(descending=True, stable=True).tolist()]
        else:
            order = random.Random(f"{how.seed} {task.name} {trial} {i}").sample(task.support, len(task.support))
        right = set(map(normalise, query.truths))
        examples: list[Chunk] = []
        for row in order:
            if len(examples) == most:
                break
            example = task.solve(row, query)
            if row != query.row and not _gives_away(task, example, right):
                examples.append(example)
        chosen.append(examples[::-1])  # the most alike last
    return chosen


def check_shots(task: Task, how: FewShot, predictor: Predictor) -> None:
    """Raises InputError, before anything is run, for more shots than pictures or than fit into the positions."""
    solved = {  # style → row → example: the same for all queries of a style
        style: {row: task.solve(row, query) for row in task.support}
        for style, query in {query.style: query for query in task.queries}.items()
    }
    available = len(task.support)
    for query in task.queries:
        right = set(map(normalise, query.truths))
        own = solved[query.style].items()
        available = min(available, sum(row != query.row and not _gives_away(task, e, right) for row, e in own))
    if how.most > available:
        raise InputError(
            f"--shots {max(how.shots)} asks for more examples than there are pictures to draw them from: "
            f"at most {available} ({task.name})"
        )
    examples = [example for own in solved.values() for example in own.values()]
    predictor.check_room(how.most, examples, [Chunk(query.row, query.prompt) for query in task.queries])


# ----------------------------------------------------------------------------------------------------- the curve
def curve(
    task: Task, how: FewShot, predictor: Predictor, parts: Parts, controls: Sequence[str] = ("text_only_demos",)
) -> dict[str, dict]:
    """shots ("0", "1", …) → {exact_match, …_spread, …_interval, and the same for each control}.

    controls: of the examples (text_only_demos, shuffled_demos), and blind: at 0 shots the query's picture is taken away
    (`blind`, …_blind): what the text alone is worth.
    A task's other scores stand there too, such as cider_d and cider_d_text_only_demos of captions that people wrote.
    The spread is the standard deviation over trials (0 for a single one, as at 0 shots); the interval is over queries.
    """
    table: dict[str, dict] = {}
    for shots in how.shots:
        trials = how.trials if shots else 1
        predictions: dict[str, list[list[str]]] = {}  # way → trials
        for way in ("", *controls):
            if way == "blind":
                if not shots:
                    predictions[way] = [_answers(task, how, shots, 0, predictor, parts, way)]
            elif way and shots < _FEWEST[way]:  # without an example all ways are one
                predictions[way] = predictions[""]
            else:
                predictions[way] = [_answers(task, how, shots, t, predictor, parts, way) for t in range(trials)]
        row: dict = {}
        for score, marks in task.scores.items():
            for way, answers in predictions.items():
                row |= _summary(score_name(score, way), [marks(trial, task.queries) for trial in answers])
        table[str(shots)] = row | {"n": len(task.queries), "trials": trials}
    return table


# How a way is called in titles, and the fewest examples at which it differs from the plain one.
_TITLES = {"": "", "text_only_demos": ", texts only", "shuffled_demos": ", shuffled", "blind": ", blind"}
_FEWEST = {"text_only_demos": 1, "shuffled_demos": 2}


def score_name(score: str, way: str) -> str:
    """exact_match of text_only_demos is called by the way alone; others are called by both: cider_d_text_only_demos."""
    return way if way and score == "exact_match" else f"{score}_{way}".rstrip("_")


def _answers(
    task: Task, how: FewShot, shots: int, trial: int, predictor: Predictor, parts: Parts, way: str = ""
) -> list[str]:
    title = f"{task.name}, {shots} shots, trial {trial + 1}{_TITLES[way]}"

    def work() -> list[str]:
        examples, count = choose_examples(task, how.most, how, trial, predictor), how.examples_at(shots)
        texts = [
            prompt_text(query, own[how.most - count :], way if shots else "text_only_demos")
            for query, own in zip(task.queries, examples, strict=True)
        ]
        if task.answers is None:
            return predictor.predict(texts, title, blind=way == "blind")
        chosen = predictor.choose(texts, task.answers, title, blind=way == "blind").argmax(dim=1)
        return [task.answers[k] for k in chosen.tolist()]

    return parts.keep(title, work)


def _marks(answers: Sequence[str], queries: Sequence[Query]) -> np.ndarray:
    return exact_match(answers, [query.truths for query in queries])


def _cider(answers: Sequence[str], queries: Sequence[Query]) -> np.ndarray:
    references = [[ptb_tokens(text) for text in query.truths] for query in queries]
    return cider_d([ptb_tokens(text) for text in answers], references)


def _summary(name: str, trials: Sequence[np.ndarray]) -> dict:
    """Mean over queries and trials, spread over trials, 95 % interval over queries."""
    by_query = np.mean(trials, axis=0)  # (N,)
    low, high = bootstrap_interval(by_query)
    return {
        name: float(by_query.mean()),
        f"{name}_spread": float(np.std([trial.mean() for trial in trials])),
        f"{name}_interval": [float(low), float(high)],
    }


def few_shot_columns(result: dict) -> list[tuple[str, dict, str]]:
    """The columns of a few-shot table: (title, rows by shots, which score of them)."""
    columns = [(name, result["shots"], name) for name in SCORES]
    for name, title in TASKS.items():
        if name in result:
            table = result[name]["shots"]
            columns += [(title, table, "exact_match"), (f"{title}, VQA accuracy", table, "vqa_accuracy")]
    return [column for column in columns if any(row.get(column[2]) is not None for row in column[1].values())]


# ----------------------------------------------------------------------------------------------------- the tasks
def captioning_task(
    name: str,
    items: Sequence[Item],
    rows: Sequence[int],
    test_set: EvaluationSet,
    support: Sequence[int],
    template: str,
) -> Task:
    """Captions. In the classroom nothing but the examples shows the style: the query has no cue."""
    shown = dict(zip(support, test_set.support, strict=True))
    queries = [Query(row, template, item.truths, item.style) for row, item in zip(rows, items, strict=True)]
    by_people = {} if test_set.classroom else {"cider_d": _cider}
    return Task(
        name, queries, support, lambda row, query: Chunk(row, template, shown[row].caption_in(query.style)),
        own_answers=not all(item.captioned_by_class for item in items), scores={"exact_match": _marks} | by_people,
    )  # fmt: skip


def questions_task(
    items: Sequence[Item], rows: Sequence[int], test_set: EvaluationSet, support: Sequence[int], seed: int
) -> Task:
    """One question about each scene; the examples have one question each about theirs."""
    shown = dict(zip(support, test_set.support, strict=True))

    def ask(row: int, scene: scenes.Scene) -> Chunk:
        return question_chunk(row, scene, random.Random(f"question {seed} {row}"))

    asked = [ask(row, item.scene) for row, item in zip(rows, items, strict=True)]
    queries = [Query(chunk.picture, chunk.prompt, [chunk.caption]) for chunk in asked]
    return Task("questions", queries, support, lambda row, query: ask(row, shown[row].scene))


def one_word_task(queries: Sequence[tuple[int, scenes.Scene]], test_set: EvaluationSet, support: Sequence[int]) -> Task:
    """Each picture is answered by one word, by a rule that holds throughout a prompt: the thing on the left, the thing
    on the right, the ground, or how many. Every prompt has the same cue, so only the examples show the rule; and which
    of two things a name was, left or right, only their *pictures* show. queries: (row, scene), the rules go round."""
    shown = {
        row: item.scene for row, item in zip(support, test_set.support, strict=True)
        if item.scene.layout in scenes.RULE_LAYOUTS
    }  # fmt: skip
    rules = [scenes.RULES[i % len(scenes.RULES)] for i in range(len(queries))]
    asked = [
        Query(row, scenes.ONE_WORD, [scene.by_rule(rule)], rule)
        for (row, scene), rule in zip(queries, rules, strict=True)
    ]
    return Task(
        "one word", asked, list(shown), lambda row, query: rule_chunk(row, shown[row], query.style),
        chance=1 / len(scenes.RULES),
    )  # fmt: skip
