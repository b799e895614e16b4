"""Does it learn from examples? Prompts of solved examples, and what they are worth.

What this file teaches: a few-shot prompt is one document, in which each picture is followed by its answer and closed
by <|endofchunk|>, and the last is left open:

    <image> Output: a dog<|endofchunk|><image> Output: two cats<|endofchunk|><image> Output:

(`Output:` is the template of the Flamingo papers for photographs, an option; models trained by train.py know none.)
A rising curve does not prove that the example *pictures* were read: the same examples without pictures and <image>
tags (`text_only_demos`) tell how much came from their words.

**0 shots** here means no example at all. The "0-shot" of the Flamingo papers shows two examples without their pictures
(zero_shot="two-texts"; also what `text_only_demos` is at 2 shots).

Examples are drawn from the training split, at random by seed, or the most similar ones (RICES, Yang et al. 2022:
nearest by the vision encoder's pooled features, the most alike last, next to the question).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flamingo.data import scenes
from flamingo.data.classroom import question_chunk
from flamingo.errors import InputError
from flamingo.evaluation.answers import Answerer
from flamingo.evaluation.exam import Exam, Item
from flamingo.evaluation.metrics import bootstrap_interval, cider_d, exact_match, normalise
from flamingo.evaluation.parts import Parts
from flamingo.evaluation.ptb import ptb_tokens
from flamingo.processor import EOC_TOKEN, Chunk

SCORES = ("exact_match", "exact_match_novel", "text_only_demos", "cider_d", "cider_d_text_only_demos")  # of captions


@dataclass(frozen=True)
class Query:
    """A picture (row of the bank), what the model is told after it, the answers that are right, and their style."""

    row: int
    prompt: str
    truths: Sequence[str]
    style: str = ""


@dataclass(frozen=True)
class Task:
    """Queries, and the support pictures (rows of the bank) that `solve` turns into examples for a query.

    answers: to choose among (classification), or None to speak freely. chance: of guessing right, if known.
    """

    name: str
    queries: Sequence[Query]
    support: Sequence[int]
    solve: Callable[[int, Query], Chunk]
    answers: Sequence[str] | None = None
    chance: float | None = None


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
def prompt_text(query: Query, examples: Sequence[Chunk], text_only: bool = False) -> list[Chunk]:
    """The chunks of a prompt. text_only: examples keep their words and their <|endofchunk|>, not their pictures."""
    if text_only:
        examples = [replace(chunk, picture=None, caption=chunk.caption + EOC_TOKEN) for chunk in examples]
    return [*examples, Chunk(query.row, query.prompt)]


def _gives_away(task: Task, example: Chunk, right: set[str]) -> bool:
    """No example may be the answer. (Not so for questions and classification: "a dog" may be the answer twice.)"""
    return task.name.startswith("caption") and normalise(example.caption) in right


def choose_examples(task: Task, most: int, how: FewShot, trial: int, answerer: Answerer) -> list[list[Chunk]]:
    """For each query its examples, `most` of them; for fewer shots take the last ones. The same for the same trial.

    No example gives the answer away: where the caption is one of the query's right ones another picture is taken.
    """
    chosen = []
    for i, query in enumerate(task.queries):
        if how.demos == "rices":
            similarity = answerer.pooled[list(task.support)] @ answerer.pooled[query.row]
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


def check_shots(task: Task, how: FewShot, answerer: Answerer) -> None:
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
    answerer.check_room(how.most, examples, [Chunk(query.row, query.prompt) for query in task.queries])


# ----------------------------------------------------------------------------------------------------- the curve
def curve(task: Task, how: FewShot, answerer: Answerer, parts: Parts, text_only: bool = True) -> dict[str, dict]:
    """shots ("0", "1", …) → {exact_match, …_spread, …_interval, and the same for text_only_demos}.

    Captions of sets that people wrote also get cider_d and cider_d_text_only_demos. The spread is the standard
    deviation over trials (0 for a single one, as at 0 shots); the interval is over queries.
    """
    by_people = task.name.startswith("caption") and not task.queries[0].style
    table: dict[str, dict] = {}
    for shots in how.shots:
        trials = how.trials if shots else 1
        said = [_answers(task, how, shots, trial, False, answerer, parts) for trial in range(trials)]
        only_words = said if not shots or not text_only else [
            _answers(task, how, shots, trial, True, answerer, parts) for trial in range(trials)
        ]  # fmt: skip
        row = _summary("exact_match", [_marks(task, answers) for answers in said])
        if text_only:
            row |= _summary("text_only_demos", [_marks(task, answers) for answers in only_words])
        if by_people:
            row |= _summary("cider_d", [_cider(task, answers) for answers in said])
            row |= _summary("cider_d_text_only_demos", [_cider(task, answers) for answers in only_words])
        table[str(shots)] = row | {"n": len(task.queries), "trials": trials}
    return table


def _answers(
    task: Task, how: FewShot, shots: int, trial: int, text_only: bool, answerer: Answerer, parts: Parts
) -> list[str]:
    title = f"{task.name}, {shots} shots, trial {trial + 1}" + (", texts only" if text_only else "")

    def work() -> list[str]:
        examples, count = choose_examples(task, how.most, how, trial, answerer), how.examples_at(shots)
        texts = [
            prompt_text(query, own[how.most - count :], text_only or not shots)
            for query, own in zip(task.queries, examples, strict=True)
        ]
        if task.answers is None:
            return answerer.say(texts, title)
        return [task.answers[k] for k in answerer.choose(texts, task.answers, title).argmax(dim=1).tolist()]

    return parts.keep(title, work)


def _marks(task: Task, answers: Sequence[str]) -> np.ndarray:
    return exact_match(answers, [query.truths for query in task.queries])


def _cider(task: Task, answers: Sequence[str]) -> np.ndarray:
    references = [[ptb_tokens(text) for text in query.truths] for query in task.queries]
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


# ----------------------------------------------------------------------------------------------------- the tasks
def captioning_task(name: str, items: Sequence[Item], rows: Sequence[int], exam: Exam, support: Sequence[int],
                    template: str) -> Task:  # fmt: skip
    """Captions. In the classroom nothing but the examples tells the style: the query has no cue."""
    shown = dict(zip(support, exam.support, strict=True))
    queries = [Query(row, template, item.truths, item.style) for row, item in zip(rows, items, strict=True)]
    return Task(name, queries, support, lambda row, query: Chunk(row, template, shown[row].told_as(query.style)))


def questions_task(items: Sequence[Item], rows: Sequence[int], exam: Exam, support: Sequence[int], seed: int) -> Task:
    """One question about each scene; the examples ask one question each about theirs."""
    shown = dict(zip(support, exam.support, strict=True))

    def ask(row: int, scene: scenes.Scene) -> Chunk:
        return replace(question_chunk(scene, random.Random(f"question {seed} {row}")), picture=row)

    asked = [ask(row, item.scene) for row, item in zip(rows, items, strict=True)]
    queries = [Query(chunk.picture, chunk.prompt, [chunk.caption]) for chunk in asked]
    return Task("questions", queries, support, lambda row, query: ask(row, shown[row].scene))
