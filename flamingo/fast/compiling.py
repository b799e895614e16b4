"""torch.compile of what trains.

Replaces: the resampler and the cross-attention blocks run operator by operator. (The language model's layers are told
apart by a number, and each would be compiled anew.)
"""

import shutil

import torch

from flamingo.errors import InputError
from flamingo.model.vlm import VisionLanguageModel


def compile_trained_parts(model: VisionLanguageModel, backend: str = "inductor") -> None:
    """In place and for any length of text. Raises InputError without a compiler."""
    if not torch.cuda.is_available() and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise InputError("--compile needs a C++ compiler, and none was found: install one, or leave --compile out")
    model.vision_tokenizer.compile(dynamic=True, backend=backend)
    for block in model.cross_attention_blocks():
        block.compile(dynamic=True, backend=backend)
