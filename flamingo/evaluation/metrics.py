"""Scores of captions against what people wrote, in plain Python, equal to pycocoevalcap's.

What this file teaches: what BLEU, ROUGE-L and CIDEr-D count, and how far a score can be trusted. Every score is taken
apart into numbers of single pictures; drawing the pictures again with replacement, many times, gives its interval.

All scores take words, see ptb.py: `candidates` one list of words for each picture, `references` several for each.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from flamingo.errors import InputError
from flamingo.evaluation.ptb import ptb_tokens

ORDERS = 4  # n-grams of 1 to 4 words, in BLEU and in CIDEr-D
ONE_IS_ALL = "from 0 to 1 (all)"
ONE_PICTURE = "it weighs a word by how few pictures have it, and with one picture every weight is 0"

Words = list[str]


@dataclass(frozen=True)
class Score:
    """A score with its 95 % interval (None where resampling pictures means nothing), its scale, and over how many."""

    value: float
    low: float | None
    high: float | None
    n: int
    scale: str

    def to_dict(self) -> dict:
        """For a JSON report: {"value", "low", "high", "n", "scale"}."""
        return asdict(self)


def caption_metrics(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Score]:
    """Every caption score of a test set.

    candidates: one caption for each picture. references: the right captions of the same pictures, one or more each.
    Returns bleu_1 … bleu_4, rouge_l, cider_d, exact_match, distinct_captions, vocabulary. CIDEr-D is left out, with a
    warning, if there is but one picture. Raises InputError if a picture has no candidate or no reference.
    """
    _check_pairs(candidates, references)
    predictions = [ptb_tokens(text) for text in candidates]
    right = [[ptb_tokens(text) for text in texts] for texts in references]
    n = len(predictions)

    counts = bleu_counts(predictions, right)
    low, high = bootstrap_interval(counts, bleu_of_counts, resamples=resamples, seed=seed)
    scores = {
        f"bleu_{k + 1}": Score(float(value), float(low[k]), float(high[k]), n, ONE_IS_ALL)
        for k, value in enumerate(bleu_of_counts(counts.sum(axis=0)))
    }
    scores["rouge_l"] = mean_score(rouge_l(predictions, right), ONE_IS_ALL, resamples=resamples, seed=seed)
    if n > 1:
        scale = "1.0 is 100 in papers (it can pass 1; at most 10)"
        scores["cider_d"] = mean_score(cider_d(predictions, right), scale, resamples=resamples, seed=seed)
    else:
        warnings.warn(f"cider_d is left out: {ONE_PICTURE}", stacklevel=2)
    scores["exact_match"] = mean_score(exact_match(candidates, references), ONE_IS_ALL, resamples=resamples, seed=seed)
    scores["distinct_captions"] = Score(distinct_captions(candidates), None, None, n, ONE_IS_ALL)
    scores["vocabulary"] = Score(vocabulary(predictions), None, None, n, "different words")
    return scores


# ---------------------------------------------------------------------------------------------------- n-gram scores


def ngrams(words: Words, order: int) -> Counter:
    """How often each run of `order` words occurs."""
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def bleu_counts(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """What BLEU (Papineni et al. 2002) counts, (N, 10): candidate length, reference length, right n-grams of 1 to 4
    words, all n-grams of 1 to 4 words.

    An n-gram is right as often as the reference that has it most often. Of several references, the length that counts
    is the one closest to the candidate's, the shorter of two equally close.
    """
    rows = []
    for predictions, right in zip(candidates, references, strict=True):
        closest = min((abs(len(words) - len(predictions)), len(words)) for words in right)[1]
        matched, possible = [], []
        for order in range(1, ORDERS + 1):
            allowed = Counter()
            for words in right:
                allowed |= ngrams(words, order)  # | of two counters: the larger count of each
            matched.append((ngrams(predictions, order) & allowed).total())  # & : the smaller
            possible.append(max(0, len(predictions) - order + 1))
        rows.append([len(predictions), closest, *matched, *possible])
    return np.array(rows, dtype=float)


def bleu_of_counts(counts: np.ndarray) -> np.ndarray:
    """BLEU-1 … BLEU-4 of a set from its counts, summed over pictures: (…, 10) → (…, 4).

    BLEU-n is the geometric mean of the shares of right 1- to n-grams, times a penalty for captions that are too short.
    The two tiny numbers against division by zero are pycocoevalcap's.
    """
    length, reference_length = counts[..., 0], counts[..., 1]
    matched, possible = counts[..., 2 : 2 + ORDERS], counts[..., 2 + ORDERS :]
    share = (matched + 1e-15) / (possible + 1e-9)
    geometric_mean = np.cumprod(share, axis=-1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return geometric_mean * penalty[..., None]


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 … BLEU-4 of a set, from 0 to 1. (There is no mean over pictures: n-grams are counted over the set.)"""
    _check_pairs(candidates, references)
    return bleu_of_counts(bleu_counts(candidates, references).sum(axis=0)).tolist()


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0) -> np.ndarray:
    """CIDEr-D of each picture, (N,); the set's is their mean. 1.0 here is 100 in papers (and 10 the upper end).

    Vedantam et al. 2015, as in the class `Cider` of pycocoevalcap, whose n-gram weights are log(N / pictures that have
    it in a reference): they come from the references given, so sets of different pictures cannot be compared.
    sigma: how many words of difference in length are forgiven. Raises InputError for a single picture.
    """
    _check_pairs(candidates, references)
    if len(candidates) < 2:
        raise InputError(f"CIDEr-D needs at least 2 pictures: {ONE_PICTURE}")
    cider = Cider(references, sigma)
    scores = []
    for predictions, right in zip(candidates, references, strict=True):
        weighed = cider.weigh(predictions)
        scores.append(sum(cider.alike(weighed, cider.weigh(words)) for words in right) / len(right))
    return np.array(scores)


@dataclass(frozen=True)
class Weighed:
    """A caption as CIDEr-D sees it: for each order its n-grams with their weights, and the length of that list as a
    vector. words: how many."""

    grams: list[dict[tuple, float]]
    norms: list[float]
    words: int


class Cider:
    """How alike two captions are, by CIDEr-D, where n-grams weigh log(N / pictures that have it in a reference)."""

    def __init__(self, references: Sequence[Sequence[Words]], sigma: float = 6.0):
        self.pictures, self.sigma, self.pictures_with = len(references), sigma, Counter()
        for right in references:
            self.pictures_with.update(
                {gram for words in right for order in range(1, ORDERS + 1) for gram in ngrams(words, order)}
            )

    def weigh(self, words: Words) -> Weighed:
        grams = [
            {gram: count * math.log(self.pictures / max(1, self.pictures_with[gram])) for gram, count in found.items()}
            for found in (ngrams(words, order) for order in range(1, ORDERS + 1))
        ]
        return Weighed(grams, [math.hypot(*weights.values()) for weights in grams], len(words))

    def alike(self, predictions: Weighed, right: Weighed) -> float:
        """From 0 to 10: the mean cosine of the orders' weighed n-grams, where an n-gram more frequent than in the
        reference earns no more, times what is forgiven of a difference in length."""
        cosines = 0.0
        for own, others, *norms in zip(predictions.grams, right.grams, predictions.norms, right.norms, strict=True):
            if norm := math.prod(norms):
                cosines += (
                    sum(min(own[gram], others[gram]) * others[gram] for gram in own.keys() & others.keys()) / norm
                )
        return 10 * cosines / ORDERS * float(self.forgiven(predictions.words, right.words))

    def forgiven(self, words: int, others: int | np.ndarray) -> np.ndarray:
        """What is left of a score when lengths differ, from 0 to 1; others: one length or many."""
        # pycocoevalcap measures lengths in pairs of words: the same difference, except for an empty caption
        gap = np.maximum(0, words - 1) - np.maximum(0, others - 1)
        return np.exp(-(gap**2) / (2 * self.sigma**2))


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2) -> np.ndarray:
    """ROUGE-L of each picture, (N,), from 0 to 1; the set's is their mean.

    The longest common subsequence as a share of the candidate (precision) and of the reference (recall). As in
    pycocoevalcap the best precision and the best recall may come from different references; beta > 1 favours recall.
    """
    _check_pairs(candidates, references)
    scores = []
    for predictions, right in zip(candidates, references, strict=True):
        predictions = predictions or [""]  # pycocoevalcap counts an empty caption as one empty word
        common = [(longest_common_subsequence(predictions, words or [""]), max(1, len(words))) for words in right]
        precision = max(length for length, _ in common) / len(predictions)
        recall = max(length / words for length, words in common)
        weight = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / weight if weight else 0.0)
    return np.array(scores)


def longest_common_subsequence(a: Words, b: Words) -> int:
    """How many words the two share in the same order, gaps allowed."""
    row = [0] * (len(b) + 1)  # row[j]: the length for the part of a seen so far and the first j words of b
    for word in a:
        above = row
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1]


# ------------------------------------------------------------------------------------------- scores of whole captions


def normalise(text: str) -> str:
    """Case and spaces do not count; everything else does."""
    return " ".join(text.lower().split())


def exact_match(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """1.0 for each caption that is one of its picture's references, else 0.0: (N,)."""
    _check_pairs(candidates, references)
    return np.array(
        [
            float(normalise(predictions) in map(normalise, right))
            for predictions, right in zip(candidates, references, strict=True)
        ]
    )


def distinct_captions(candidates: Sequence[str]) -> float:
    """The share of different captions, from 0 to 1. Near 0: the model gives the same caption whatever it is shown."""
    return len({normalise(text) for text in candidates}) / len(candidates)


def vocabulary(candidates: Sequence[Words]) -> int:
    """How many different words the captions use."""
    return len({word for words in candidates for word in words})


# ---------------------------------------------------------------------------------------------------------- intervals


def bootstrap_interval(
    per_picture: np.ndarray,
    score_of_sums: Callable[[np.ndarray], np.ndarray] | None = None,
    *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The percentile interval (low, high) of a score, over test sets drawn from these pictures with replacement.

    per_picture: (N,) scores, or (N, K) counts from which `score_of_sums`, (R, K) → (R, …), makes the score of a set.
    Without it the score is the mean. The interval covers the choice of test pictures, not the seed of the training.
    CIDEr-D's n-gram weights are held fixed: those of the whole set count in every draw.
    """
    per_picture = np.asarray(per_picture, dtype=float)
    n = len(per_picture)
    generator = np.random.default_rng(seed)
    sums = np.stack(
        [np.bincount(generator.integers(n, size=n), minlength=n) @ per_picture for _ in range(resamples)]
    )  # (R,) or (R, K): each picture counts as often as it was drawn
    values = score_of_sums(sums) if score_of_sums else sums / n
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(values, [tail, 100 - tail], axis=0)
    return low, high


def mean_score(per_picture: np.ndarray, scale: str, *, resamples: int = 1000, seed: int = 0) -> Score:
    """The mean of per-picture scores, (N,), with its interval."""
    low, high = bootstrap_interval(per_picture, resamples=resamples, seed=seed)
    return Score(float(np.mean(per_picture)), float(low), float(high), len(per_picture), scale)


def _check_pairs(candidates: Sequence, references: Sequence[Sequence]) -> None:
    if len(candidates) != len(references):
        raise InputError(
            f"{len(candidates)} captions, but references of {len(references)} pictures: give one caption for each"
        )
    if not len(candidates):
        raise InputError("there is no caption to score")
    for i, right in enumerate(references):
        if isinstance(right, str):
            raise InputError(f"the references of picture {i} are one text: give a list of texts")
        if not len(right):
            raise InputError(f"picture {i} has no reference: leave it out, or give it at least one")
