"""A model that only generates from now on, made fast.

What this file teaches: a step that adds one token to a text multiplies every matrix of the model by one vector. There
is next to nothing to compute; the time is that of reading the weights. So they are kept in the fewest bytes that say
the same, and on a CPU in the order in which they are read: PyTorch's matrices lie row by row, and oneDNN, which
multiplies there, would rearrange them anew at every call. For eight texts or three beams that halves a step.
"""

import torch
from torch import Tensor, nn

from flamingo.added_tokens import DecoupledLinear
from flamingo.modeling import VisionLanguageModel
from flamingo.training import hold_frozen_in_bf16


def prepare_to_generate(model: VisionLanguageModel, dtype: str) -> None:
    """In place; the model can neither be trained nor saved afterwards.

    dtype: of the matrices, float32 or bfloat16; bfloat16 needs autocast in every call.
    """
    if dtype == "bfloat16":
        hold_frozen_in_bf16(model, trained=True)
    if next(model.parameters()).device.type == "cpu" and can_pack(dtype):
        pack_matrices(model.perceiver)
        pack_matrices(model.lang_encoder)


def can_pack(dtype: str) -> bool:
    """Has this PyTorch oneDNN, and can oneDNN work in this dtype on this processor?"""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == "float32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack_matrices(module: nn.Module) -> None:
    """Replace every linear layer by a `PackedLinear`, and that part of the head which is frozen."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child))
        elif isinstance(child, DecoupledLinear):
            child.packed = PackedLinear(child)
        else:
            pack_matrices(child)


class PackedLinear(nn.Module):
    """A linear layer with its matrix in oneDNN's own order: (…, D_in) → (…, D_out), without gradient."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.dtype = linear.weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")
