"""Question answering and classification on a captioned set.

What this file teaches: the same few-shot prompts serve three tasks, and the task decides how an output is scored.

    captions          <image> a dog runs along the beach                      a caption, against several references
    questions         <image>Question: How many dogs? Answer: 2               a short answer, against people's answers
    classification    <image> golden retriever                                the likeliest of all class names

People differ in their answers, so where each question has at least two the rule of VQAv2 counts them (vqa.py). Many
questions can be answered without looking ("What colour is the banana?"): beside the score at 0 shots stands `blind`,
the same question with the picture taken away.
"""

import random
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

import numpy as np

from flamingo.data.answer_columns import Question, question_prompt
from flamingo.data.chunks import Chunk
from flamingo.evaluation.few_shot import Query, Task, score_name
from flamingo.evaluation.metrics import exact_match
from flamingo.evaluation.test_set import EvaluationSet
from flamingo.evaluation.vqa import normalise_answer, vqa_accuracies


# -------------------------------------------------------------------------------------------------- scores
def answers_match(answers: Sequence[str], queries: Sequence[Query]) -> np.ndarray:
    """1.0 where the answer is one of people's, both in VQAv2's form ("Two." is "2"), else 0.0: (N,)."""
    form = lambda text: normalise_answer(text) or text  # noqa: E731  (of "a", an article, nothing would be left)
    return exact_match(list(map(form, answers)), [list(map(form, query.truths)) for query in queries])


def vqa_marks(answers: Sequence[str], queries: Sequence[Query]) -> np.ndarray:
    """The accuracy of each answer by the rule of VQAv2, (N,)."""
    return vqa_accuracies(answers, [query.truths for query in queries])


# --------------------------------------------------------------------------------------------------- tasks
def questions_of_set(
    test_set: EvaluationSet, rows: Sequence[int], support: Sequence[int], n: int, seed: int
) -> Task | None:
    """At most n questions: one about every picture, then a second about every picture that has one, and so on.

    The examples are other pictures' questions, one drawn of each, with what most people answered. None if there is no
    question.
    """
    shown = {row: item for row, item in zip(support, test_set.support, strict=True) if item.questions}
    of_each = [[(row, question) for question in item.questions] for row, item in zip(rows, test_set.items, strict=True)]
    asked: list[tuple[int, Question]] = [pair for pair in chain(*zip_longest(*of_each)) if pair][:n]
    if not asked:
        return None

    def solve(row: int, _: Query) -> Chunk:
        question = random.Random(f"question {seed} {row}").choice(shown[row].questions)
        return Chunk(row, question_prompt(question.text), question.answer)

    queries = [Query(row, question_prompt(question.text), question.answers) for row, question in asked]
    by_several = all(len(question.answers) > 1 for _, question in asked)
    scores = {"exact_match": answers_match} | ({"vqa_accuracy": vqa_marks} if by_several else {})
    return Task("questions", queries, list(shown), solve, scores=scores)


def classes_of_set(
    test_set: EvaluationSet, rows: Sequence[int], support: Sequence[int], n: int, template: str
) -> Task | None:
    """Which class is it? At most n labelled pictures. None if there are no labels, or only one name to choose."""
    shown = {row: item for row, item in zip(support, test_set.support, strict=True) if item.label}
    asked = [(row, item.label) for row, item in zip(rows, test_set.items, strict=True) if item.label][:n]
    if not asked or len(test_set.names) < 2:
        return None
    return Task(
        "classification", [Query(row, template, [name]) for row, name in asked], list(shown),
        lambda row, _: Chunk(row, template, shown[row].label), test_set.names, chance=1 / len(test_set.names),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- results
def answer_results(test_set: EvaluationSet, tasks: dict[str, Task], curve_of: Callable[[Task], dict]) -> dict:
    """The keys `questions` and `classification` of a captioned set, as far as it has such columns."""
    result = {}
    if test_set.left_out is not None:
        task = tasks.get("questions")
        n, table = (len(task.queries), curve_of(task)) if task else (0, {})
        result["questions"] = {"n": n, "left_out": test_set.left_out, "shots": table}
    if "classification" in tasks:
        task = tasks["classification"]
        result["classification"] = {"chance": task.chance, "names": len(task.answers), "shots": curve_of(task)}
    return result


def answers_sentence(result: dict) -> str:
    """What the table does not hold about a captioned set's questions and classes; "" if it has none."""
    if "exact_match_style_given" in result:  # the classroom
        return ""
    predictions = []
    if "questions" in result:
        held = result["questions"]
        left_out = f", {held['left_out']} left out (no text)" if held["left_out"] else ""
        predictions.append(f"Questions: n = {held['n']}{left_out}{_blind(held['shots'])}.")
    if "classification" in result:
        held = result["classification"]
        predictions.append(f"Which one: {held['names']} names, guessing {held['chance']:.3f}{_blind(held['shots'])}.")
    return " ".join(predictions)


def _blind(table: dict) -> str:
    row = table.get("0", {})
    name = "vqa_accuracy" if "vqa_accuracy" in row else "exact_match"
    blind = score_name(name, "blind")
    return f"; at 0 shots {row[name]:.3f}, the picture taken away {row[blind]:.3f}" if row else ""
