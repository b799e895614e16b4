"""A caption chosen with the help of similar pictures' captions.

What this file teaches: the likeliest caption is not the one that people would agree on most. Where there are captioned
pictures that look like this one, their captions say what people tend to write about such a picture, and the model says
what fits *this* one. Each candidate gets the score

    Σ_j w_j · CIDEr-D(candidate, captions of neighbour j)  +  LIKELIHOOD · log p(candidate | picture) / words

and the highest wins (consensus reranking: Devlin et al. 2015, "Exploring nearest neighbor approaches for image
captioning"; with a language model's likelihood beside it: Devlin et al. 2015, "Language models for image captioning").
Candidates are the model's own, the likeliest one and some drawn at random, and those of the neighbours' captions that
the first term likes best; the best of these alone is what the control `consensus` gives, without any model.

The two constants and the weights were chosen on pictures held out of a training set (assets/photos/EXPERIMENTS.md).
"""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from flamingo.data.chunks import Chunk
from flamingo.evaluation.metrics import Cider, Weighed
from flamingo.evaluation.predictor import Predictor
from flamingo.evaluation.ptb import ptb_tokens
from flamingo.evaluation.test_set import Item

DRAWN, TEMPERATURE = 8, 0.7  # captions of the model's own beside the likeliest one
NEAREST = 10  # neighbours whose captions may be given; more of them judge
LIKELIHOOD = 0.15  # CIDEr-D that a nat a word is worth
SHARPNESS = 10.0  # a neighbour weighs exp(SHARPNESS · cosine)


class Judges:
    """Captioned pictures; of each new picture the `count` most similar ones judge the captions it might get.

    vectors: (M, d), of the support pictures. A channel counts by how little it usually deviates.
    """

    def __init__(self, support: Sequence[Item], vectors: Tensor, count: int):
        self.captions = [list(item.truths) for item in support]
        self.deviation = vectors.std(dim=0) + 1e-6
        self.vectors, self.count = F.normalize(vectors / self.deviation, dim=-1), min(count, len(support))
        self.cider = Cider([[ptb_tokens(text) for text in texts] for texts in self.captions])
        self._weighed: dict[str, Weighed] = {}
        self._best: dict[bytes, list[str]] = {}

    def _of(self, text: str) -> Weighed:
        if text not in self._weighed:
            self._weighed[text] = self.cider.weigh(ptb_tokens(text))
        return self._weighed[text]

    def neighbours(self, vector: Tensor) -> tuple[list[list[str]], np.ndarray]:
        """Their captions, and what each neighbour weighs; together 1. vector: (d,) of the new picture."""
        alike, rows = (self.vectors @ F.normalize(vector / self.deviation, dim=-1)).topk(self.count)
        return [self.captions[row] for row in rows.tolist()], (SHARPNESS * alike).softmax(dim=0).cpu().numpy()

    def expected(self, vector: Tensor, candidates: Sequence[str]) -> np.ndarray:
        """The CIDEr-D that each candidate has with the neighbours' captions, (K,); none is compared with itself."""
        captions, weights = self.neighbours(vector)
        table = np.zeros((len(candidates), len(captions)))
        for k, text in enumerate(candidates):
            for j, others in enumerate(captions):
                alike = [self.cider.alike(self._of(text), self._of(other)) for other in others if other != text]
                table[k, j] = sum(alike) / max(1, len(alike))
        return table @ weights

    def best(self, vector: Tensor, count: int) -> list[str]:
        """The neighbours' captions with the highest expected CIDEr-D, the first of equals first."""
        key = vector.cpu().numpy().tobytes()
        if key not in self._best:  # asked for again with another's picture (a control)
            texts = list(dict.fromkeys(text for captions in self.neighbours(vector)[0][:NEAREST] for text in captions))
            order = np.argsort(-self.expected(vector, texts), kind="stable")
            self._best[key] = [texts[k] for k in order[:DRAWN]]
        return self._best[key][:count]


def choose_captions(
    predictor: Predictor, judges: Judges, rows: Sequence[int], items: Sequence[Item], title: str
) -> list[str]:
    """For each picture of the bank, in the places `rows`, the candidate with the highest score."""
    texts = [[Chunk(row, item.prompt)] for row, item in zip(rows, items, strict=True)]
    likeliest = predictor.predict(texts, title)
    drawn = predictor.draw(texts, DRAWN, TEMPERATURE, f"{title}: drawing candidates")
    chosen = []
    choosing = tqdm(range(len(rows)), desc=f"{title}: choosing", leave=False)
    for i in choosing:
        vector = predictor.pooled[rows[i]]
        candidates = list(dict.fromkeys([likeliest[i], *drawn[i], *judges.best(vector, DRAWN)]))
        likelihoods = predictor.choose([texts[i]], candidates, None)[0].numpy()  # (K,)
        words = np.array([max(1, len(ptb_tokens(text))) for text in candidates])
        scores = judges.expected(vector, candidates) + LIKELIHOOD * likelihoods / words
        chosen.append(candidates[int(scores.argmax())])
    return chosen
