"""Accuracy of short answers to questions about pictures, by the rule of VQAv2.

What this file teaches: ten people answer each question, and they differ. An answer that three others gave is right;
fewer earn a third each. Before that, answers are brought to one form: "Two dogs." and "2 dogs" are the same answer.

The rule is that of Goyal et al. 2017 and of their program (vqaEval.py of the repository GT-Vision-Lab/VQA), in the form
that normalises both sides, the model's answer and people's.
"""

import re
from collections.abc import Sequence

import numpy as np

from flamingo.errors import InputError
from flamingo.evaluation.metrics import ONE_IS_ALL, Score, mean_score

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# The contractions that the official table mends. Each is recognised with any one of its apostrophes left out.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round


def normalise_answer(answer: str) -> str:
    """An answer in VQAv2's form: no punctuation, lower case, digits for zero to ten, no article, apostrophes mended.

    A sign goes without trace if somewhere in the answer it stands next to a space, or if the answer has a number such
    as 1,000; else it becomes a space. Full stops go, except before a digit. (As in the official vqaEval.py.)
    """
    text = answer
    for sign in PUNCTUATION:
        beside_space = sign + " " in answer or " " + sign in answer
        text = text.replace(sign, "" if beside_space or re.search(r"\d,\d", answer) else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracies(answers: Sequence[str], human_answers: Sequence[Sequence[str]]) -> np.ndarray:
    """The accuracy of each answer, (N,), from 0 to 1.

    human_answers: one by each annotator (10 in VQAv2). Each of them is left out in turn; the answer earns
    min(how many of the others gave it / 3, 1), and the mean of these counts. As in the official program nothing is
    normalised where all people gave the same answer. Raises InputError for a question with fewer than 2 human answers.
    """
    if len(answers) != len(human_answers):
        raise InputError(
            f"{len(answers)} answers, but human answers to {len(human_answers)} questions: give one answer for each"
        )
    if not len(answers):
        raise InputError("there is no answer to score")
    accuracies = []
    for i, (answer, humans) in enumerate(zip(answers, human_answers, strict=True)):
        if isinstance(humans, str) or len(humans) < 2:
            raise InputError(f"question {i} has fewer than 2 human answers: the rule of VQAv2 leaves one out in turn")
        answer, humans = _plain(answer), [_plain(human) for human in humans]
        if len(set(humans)) > 1:
            answer, humans = normalise_answer(answer), [normalise_answer(human) for human in humans]
        same = [human == answer for human in humans]
        accuracies.append(np.mean([min((sum(same) - left_out) / 3, 1.0) for left_out in same]))
    return np.array(accuracies)


def vqa_accuracy(
    answers: Sequence[str], human_answers: Sequence[Sequence[str]], *, resamples: int = 1000, seed: int = 0
) -> Score:
    """The mean accuracy by the rule of VQAv2, with its interval over questions. Papers give it times 100."""
    return mean_score(vqa_accuracies(answers, human_answers), ONE_IS_ALL, resamples=resamples, seed=seed)


def _plain(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
