"""A model that only generates from now on, made fast.

Replaces: the matrices of resampler and language model, by the same numbers in the order in which they are read.
Gains: see README, *Speed*.

What this file teaches: a step that adds one token to a text multiplies every matrix of the model by one vector. There
is next to nothing to compute; the time is that of reading the weights. So they are kept in the fewest bytes that hold
the same, and on a CPU in the order in which they are read (onednn.py).
"""

import sys

from flamingo.fast.enable import enable
from flamingo.fast.onednn import pack_matrices
from flamingo.fast.precision import cast_frozen_to_bf16
from flamingo.interop import compat
from flamingo.model.linear import LinearProjection
from flamingo.model.vlm import VisionLanguageModel


def prepare_to_generate(model: VisionLanguageModel, dtype: str) -> None:
    """In place; the model can neither be trained nor saved afterwards.

    dtype: of the matrices, float32 or bfloat16; bfloat16 needs autocast in every call.
    """
    if next(model.vision_tokenizer.parameters()).device.type == "cpu" and (warning := compat.without_onednn_warning()):
        print(warning, file=sys.stderr)
    enable(model, ("grouped", "few_at_once"))
    if dtype == "bfloat16":
        cast_frozen_to_bf16(model, trained=True)
    if not isinstance(model.vision_tokenizer, LinearProjection):  # whose device and dtype its one matrix tells
        pack_matrices(model.vision_tokenizer)
    pack_matrices(model.lang_encoder, keep_rows=True)
