"""bfloat16: half the bytes, and on hardware that knows it twice the products a second.

Replaces: float32 in forward passes (autocast), and in whatever is frozen. What trains stays in float32.
Gains: see README, *Speed*.
"""

import copy
import math
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from flamingo.fast.onednn import pack_matrices
from flamingo.model.vlm import VisionLanguageModel


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """The precision of forward passes; a fresh context for each use. Weights that train stay in float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def cast_frozen_to_bf16(model: VisionLanguageModel, *, trained: bool = False) -> None:
    """Convert what is frozen to bfloat16, once: half the memory, and autocast has nothing to convert at every product.

    The vision encoder as a whole, and the language model's matrices; converting these changes no bit of what autocast
    computes. (The encoder must not run under autocast: on a CPU the attention of open_clip's towers is thirty times
    slower there than in float32.) trained: those that train as well, for a model that only generates from now on; an
    optimizer needs them in float32.
    """
    model.vision_encoder.to(torch.bfloat16)
    pack_matrices(model.vision_encoder)
    for module in list(model.modules()):
        weight = dict(module.named_parameters(recurse=False)).get("weight")  # a LoRA layer only hands on its matrix's
        is_matrix = weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
        if is_matrix and (trained or not weight.requires_grad):
            # A new parameter, for the head's matrix may also be the token embeddings, which nothing converts.
            module.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=weight.requires_grad)
    for parameter in model.parameters():  # of what stays, each is a view of the file it was read from: as long as one
        if not parameter.requires_grad and parameter.dtype == torch.float32:  # is, all of the file stays in memory
            parameter.data = parameter.data.clone()


def bf16_is_faster(model: VisionLanguageModel, inputs: dict, device: torch.device) -> bool:
    """Is bfloat16 autocast faster here? Always on GPUs that have it; on a CPU a few texts, trained both ways, decide.

    Many CPUs have no bfloat16 unit and convert back and forth; on others the products are faster and the backward pass,
    or all the converting between, is slower: a matrix product alone would not tell. Tried on a copy: what is frozen is
    then cast to bfloat16, as it will be.

    inputs: keyword arguments of the model, with labels.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    tried = copy.deepcopy(model)

    def seconds(dtype: str) -> float:
        best = math.inf
        for _ in range(3):
            began = time.perf_counter()
            with autocast(device, dtype):
                loss = tried(**inputs).loss
            loss.backward()
            best = min(best, time.perf_counter() - began)
        return best

    exact = seconds("float32")
    cast_frozen_to_bf16(tried)
    return seconds("bfloat16") < 0.9 * exact
