"""How a CPU multiplies.

What this file teaches: PyTorch leaves the products of CPUs to oneDNN. Its matrices lie row by row; oneDNN wants blocks
that fit the processor's registers, and rearranges a matrix anew at every call. A matrix that no longer changes can be
rearranged once. That makes the frozen vision encoder a twelfth faster, and a step of generating eight texts twice as
fast. A step of one text multiplies each matrix by a single vector and gains nothing by it; but PyTorch has a product of
its own for that, which reads rows of bfloat16 faster than oneDNN reads anything: a quarter less for the step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flamingo.added_tokens import DecoupledLinear


def can_pack(matrix: Tensor) -> bool:
    """Is it a CPU that multiplies by this matrix, has this PyTorch oneDNN, and has oneDNN this dtype here?"""
    if matrix.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    in_bf16 = matrix.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return in_bf16 or matrix.dtype == torch.float32


def pack_matrices(module: nn.Module, keep_rows: bool = False) -> None:
    """Replace every linear layer by a `PackedLinear`, and that part of the head which is frozen. In place, for good:
    what is packed gets no gradient and is not saved. What cannot be packed here stays as it is."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, PackedLinear(child, keep_rows))
        elif isinstance(child, DecoupledLinear) and can_pack(child.weight):
            child.packed = PackedLinear(child, keep_rows)
        else:
            pack_matrices(child, keep_rows)


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
