"""A caption chosen with the help of captions that people wrote of other pictures.

What this file teaches: the likeliest caption is not the one that people would agree on most. What they tend to write
can be learned from the training pictures without any language model: a ridge regression, from the mean of a picture's
features to the CIDEr-D that a caption would earn beside it. The model adds what it sees in *this* picture. Each
candidate gets the score

    expected CIDEr-D  +  LIKELIHOOD · log p(candidate | picture) / words

and the highest wins (consensus reranking: Devlin et al. 2015, "Exploring nearest neighbor approaches for image
captioning", where neighbours have a vote each; with a language model's likelihood beside it: Devlin et al. 2015,
"Language models for image captioning"). Candidates are the model's own, the likeliest one and some drawn at random, and
those captions of training pictures of which the regression expects most; the best of these alone is what the control
`consensus` gives, without any model.

The constants were chosen on pictures held out of a training set (assets/photos/EXPERIMENTS.md).
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from flamingo.data.chunks import Chunk
from flamingo.evaluation.metrics import ORDERS, Cider
from flamingo.evaluation.predictor import Predictor
from flamingo.evaluation.ptb import ptb_tokens
from flamingo.evaluation.test_set import Item

DRAWN, TEMPERATURE = 16, 0.7  # captions of the model's own beside the likeliest one
GIVEN = 8  # captions of training pictures that become candidates
LIKELIHOOD = 0.1  # CIDEr-D that a nat a word is worth
RIDGE = 3.0  # the penalty on the regression's coefficients, beside pictures that are unit vectors


class Judges:
    """Captioned pictures, and what they let one expect of a caption beside a new picture.

    vectors: (M, d), of the support pictures. A channel counts by how far it lies from its mean, in deviations; one that
    hardly ever changes counts by a tenth of the usual deviation, or a trace of it would drown all others.
    """

    def __init__(self, support: Sequence[Item], vectors: Tensor):
        vectors = vectors.double().cpu()
        deviation = vectors.std(dim=0, correction=0)
        self.mean, self.deviation = vectors.mean(dim=0), deviation.clamp(min=0.1 * deviation.mean().item() + 1e-6)
        self.pictures = self._standardized(vectors)  # (M, d) unit vectors
        gram = self.pictures.T @ self.pictures  # (d, d)
        self.inverse = torch.linalg.inv(gram + RIDGE * torch.eye(len(gram), dtype=gram.dtype))
        self.captions = CaptionIndex([list(item.truths) for item in support])
        self.texts = list(dict.fromkeys(self.captions.flat))  # (D,) each once
        rows = tqdm(self.texts, desc="what each training caption is worth", leave=False)
        self.worth = np.stack([self.captions.cider_d(text) for text in rows])  # (D, M)

    def _standardized(self, vectors: Tensor) -> Tensor:
        return F.normalize((vectors - self.mean) / self.deviation, dim=-1)

    def weights(self, vector: Tensor) -> np.ndarray:
        """Of each support picture in the regression's answer, (M,), some below 0; together 1. vector: (d,).

        Ridge regression is linear in its targets: ŷ(x) = ȳ + Σ_j a_j (y_j - ȳ) with a = V (VᵀV + λ)⁻¹ x, whatever is
        asked of the pictures, so the weights of a new picture serve for every caption.
        """
        a = self.pictures @ (self.inverse @ self._standardized(vector.double().cpu()))
        return (a + (1 - a.sum()) / len(a)).numpy()

    def expected(self, weights: np.ndarray, candidates: Sequence[str]) -> np.ndarray:
        """The CIDEr-D expected of each candidate beside the picture that has these weights, (K,)."""
        return np.array([self.captions.cider_d(text) @ weights for text in candidates])

    def best(self, weights: np.ndarray, count: int) -> list[str]:
        """The training captions of which most is expected beside that picture, the first of equals first."""
        order = np.argsort(-(self.worth @ weights), kind="stable")
        return [self.texts[k] for k in order[:count]]


class CaptionIndex:
    """Captions of M pictures by their n-grams: CIDEr-D with all of them at once, for one by one would take minutes."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        self.flat = [text for own in texts for text in own]  # (C,)
        self.picture = np.repeat(np.arange(len(texts)), list(map(len, texts)))  # (C,) whose caption it is
        self.pictures = len(texts)
        words = [[ptb_tokens(text) for text in own] for own in texts]
        self.cider = Cider(words)
        self.places = defaultdict(list)  # a caption's words → where it stands
        holders, values = defaultdict(list), defaultdict(list)  # n-gram → the captions that have it, its weight there
        weighed = []
        for place, one in enumerate(chain.from_iterable(words)):
            found = self.cider.weigh(one)
            weighed.append(found)
            self.places[tuple(one)].append(place)
            for grams in found.grams:
                for gram, weight in grams.items():
                    holders[gram].append(place)
                    values[gram].append(weight)
        self.holders = {gram: (np.array(places), np.array(values[gram])) for gram, places in holders.items()}
        self.norms = np.array([found.norms for found in weighed])  # (C, 4)
        self.lengths = np.array([found.words for found in weighed])

    def cider_d(self, text: str) -> np.ndarray:
        """Of a caption beside each picture, (M,): the mean over the picture's captions.

        If it is a caption of one of the pictures alone, it is no judge of itself there. Where nothing is left to
        compare with, the picture says nothing: it gets the mean of all others.
        """
        words = ptb_tokens(text)
        own = self.cider.weigh(words)
        alike = np.zeros((len(self.flat), ORDERS))
        for order, grams in enumerate(own.grams):
            for gram, weight in grams.items():
                if gram in self.holders:
                    places, weights = self.holders[gram]
                    alike[places, order] += np.minimum(weight, weights) * weights
        norms = np.array(own.norms) * self.norms
        cosines = np.divide(alike, norms, out=np.zeros_like(alike), where=norms > 0).mean(axis=1)
        scores = 10 * cosines * self.cider.forgiven(own.words, self.lengths)
        compared = np.ones(len(self.flat))
        same = self.places.get(tuple(words), [])
        if len(set(self.picture[same])) == 1:
            compared[same] = 0
        counts = np.bincount(self.picture, compared, minlength=self.pictures)
        sums = np.bincount(self.picture, scores * compared, minlength=self.pictures)
        left = counts > 0
        means = np.divide(sums, counts, out=np.zeros(self.pictures), where=left)
        means[~left] = means[left].mean() if left.any() else 0
        return means


def choose_captions(
    predictor: Predictor, judges: Judges, rows: Sequence[int], items: Sequence[Item], title: str
) -> list[str]:
    """For each picture of the bank, in the places `rows`, the candidate with the highest score."""
    texts = [[Chunk(row, item.prompt)] for row, item in zip(rows, items, strict=True)]
    likeliest = predictor.predict(texts, title)
    drawn = predictor.draw(texts, DRAWN, TEMPERATURE, f"{title}: drawing candidates")
    chosen = []
    for i in tqdm(range(len(rows)), desc=f"{title}: choosing", leave=False):
        weights = judges.weights(predictor.pooled[rows[i]])
        candidates = list(dict.fromkeys([likeliest[i], *drawn[i], *judges.best(weights, GIVEN)]))
        likelihoods = predictor.choose([texts[i]], candidates, None)[0].numpy()  # (K,)
        words = np.array([max(1, len(ptb_tokens(text))) for text in candidates])
        scores = judges.expected(weights, candidates) + LIKELIHOOD * likelihoods / words
        chosen.append(candidates[int(scores.argmax())])
    return chosen
