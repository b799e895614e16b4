"""What the encoder alone would say: captions of the training pictures most like this one.

What this file teaches: pictures that look alike often have captions that are alike. So a frozen encoder and a list of
captioned pictures caption a new one without any language model, and a trained model is worth its training only if it
says more than these two:

    nearest     the caption of the most similar support picture
    typical     of all captions of the five most similar ones, the one that has most in common with the others
                (the consensus of Devlin et al. 2015, "Exploring nearest neighbor approaches for image captioning")
"""

from collections.abc import Sequence

from torch import Tensor

from flamingo.evaluation.test_set import Item
from flamingo.evaluation.typical import most_typical

CONTROLS = ("nearest", "typical")
NEIGHBOURS = 5


def captions_of_neighbours(vectors: Tensor, support_vectors: Tensor, support: Sequence[Item]) -> dict[str, list[str]]:
    """{"nearest", "typical": a caption for each picture}.

    vectors (N, d), support_vectors (M, d): unit vectors of the pictures and of the support pictures.
    """
    found = {name: [] for name in CONTROLS}
    for row in (vectors @ support_vectors.T).topk(min(NEIGHBOURS, len(support)), dim=1).indices.tolist():
        found["nearest"].append(support[row[0]].truths[0])
        found["typical"].append(most_typical([caption for i in row for caption in support[i].truths]))
    return found
