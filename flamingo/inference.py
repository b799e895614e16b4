"""A model that only generates from now on, made fast.

What this file teaches: a step that adds one token to a text multiplies every matrix of the model by one vector. There
is next to nothing to compute; the time is that of reading the weights. So they are kept in the fewest bytes that say
the same, and on a CPU in the order in which they are read (onednn.py).
"""

from flamingo.modeling import VisionLanguageModel
from flamingo.onednn import pack_matrices
from flamingo.training import hold_frozen_in_bf16


def prepare_to_generate(model: VisionLanguageModel, dtype: str) -> None:
    """In place; the model can neither be trained nor saved afterwards.

    dtype: of the matrices, float32 or bfloat16; bfloat16 needs autocast in every call.
    """
    if dtype == "bfloat16":
        hold_frozen_in_bf16(model, trained=True)
    pack_matrices(model.perceiver)
    pack_matrices(model.lang_encoder, keep_rows=True)
