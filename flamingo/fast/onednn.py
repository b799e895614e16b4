"""How a CPU multiplies.

Replaces: linear layers whose matrix no longer changes.
Gains: see README, *Speed*.

What this file teaches: PyTorch leaves the products of CPUs to oneDNN. Its matrices lie row by row; oneDNN wants blocks
that fit the processor's registers, and rearranges a matrix anew at every call. A matrix that no longer changes can be
rearranged once. That makes the frozen vision encoder a twelfth faster, and a step of generating eight texts twice as
fast. A step of one text multiplies each matrix by a single vector and gains nothing by it; but PyTorch has a product of
its own for that, which reads rows of bfloat16 faster than oneDNN reads anything: a quarter less for the step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo.interop import compat
from flamingo.model.added_tokens import DecoupledLinear
from flamingo.model.language_model import extend_instance


def can_pack(matrix: Tensor) -> bool:
    """Is it a CPU that multiplies by this matrix, has this PyTorch oneDNN, and has oneDNN this dtype here?"""
    return matrix.device.type == "cpu" and compat.has_onednn(matrix.dtype)


def pack_matrices(module: nn.Module, keep_rows: bool = False) -> None:
    """Replace every linear layer by a `PackedLinear`, and that part of the head which is frozen. In place, for good:
    what is packed gets no gradient and is not saved. What cannot be packed here stays as it is."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, PackedLinear(child, keep_rows))
        elif isinstance(child, DecoupledLinear) and can_pack(child.weight):
            packed = PackedLinear(child, keep_rows)
            extend_instance(child, PackedHeadMixin)
            child.packed = packed
        else:
            pack_matrices(child, keep_rows)


class PackedHeadMixin:
    """For a `DecoupledLinear`, with the frozen part of it as `packed`."""

    def old_logits(self, hidden: Tensor) -> Tensor:
        return self.packed(hidden)


class PackedLinear(nn.Module):
    """A linear layer with its matrix in oneDNN's own order: (…, D_in) → (…, D_out), without gradient.

    keep_rows: keep the rows as well, for products with a single vector. Two copies in bfloat16 take as much memory as
    one did in float32; where float32 is kept, oneDNN is the faster one there too, and nothing is kept twice.
    """

    def __init__(self, linear: nn.Linear, keep_rows: bool = False):
        super().__init__()
        weight = linear.weight.detach()
        self.dtype = weight.dtype
        self.rows = weight if keep_rows and self.dtype == torch.bfloat16 else None
        self.weight = compat.onednn_order(weight)
        self.bias = None if linear.bias is None else linear.bias.detach().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if self.rows is not None and x.numel() == x.shape[-1]:
            with compat.without_onednn():
                return F.linear(x, self.rows, self.bias)
        return compat.onednn_linear(x, self.weight, self.bias)
