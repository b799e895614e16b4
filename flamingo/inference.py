"""A model that only generates from now on, made fast.

What this file teaches: a step that adds one token to a text multiplies every matrix of the model by one vector. There
is next to nothing to compute; the time is that of reading the weights. So they are kept in the fewest bytes that say
the same, and on a CPU in the order in which they are read: PyTorch's matrices lie row by row, and oneDNN, which
multiplies there, would rearrange them anew at every call. For eight texts or three beams that halves a step. One text
gains nothing by it, but PyTorch has a product of its own that reads rows of bfloat16 faster than oneDNN reads anything.
"""

import torch
import torch.nn.functional as F
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
    """A linear layer with its matrix in oneDNN's own order: (…, D_in) → (…, D_out), without gradient.

    In bfloat16 its rows are kept as well, for products with a single vector (a step of one text, a quarter faster): two
    copies of two bytes, as much memory as the weights took in float32.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.dtype = weight.dtype
        self.rows = weight if self.dtype == torch.bfloat16 else None
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.rows is not None and x.numel() == x.shape[-1]:
            return linear_without_onednn(x, self.rows, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def linear_without_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch takes oneDNN for every product in bfloat16 unless it is switched off, for the whole process."""
    was_enabled = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = False
        return F.linear(x, weight, bias)
    finally:
        torch.backends.mkldnn.enabled = was_enabled
