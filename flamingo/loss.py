"""The loss, without ever holding all logits.

What this file teaches: the logits are the largest tensor of a training step. 835 captioned tokens × the 50267 words of
OPT-125m are 168 MB in float32, and softmax, its gradient and the conversions each want as much again. Nobody needs
them all at once. So the head runs on a part of the tokens, the loss of the part and its gradient are worked out on
the spot, and its logits are forgotten. (Liger-Kernel does this for GPUs, in one kernel.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGITS_AT_ONCE = 2**23  # 32 MiB in float32


def next_tokens(labels: Tensor) -> Tensor:
    """Labels (B, T_txt) → what the next token should be at each position, -100 where there is no loss."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits (K, vocabulary), targets (K,) → mean loss over the targets that are not -100; 0 if there are none."""
    total = F.cross_entropy(logits.float(), targets, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


def loss_by_parts(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """`mean_loss(head(hidden), targets)` of hidden states (K, D): the same loss and the same gradients."""
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    return _SumByParts.apply(head, targets, hidden, *weights) / (targets != -100).sum().clamp(min=1)


class _SumByParts(torch.autograd.Function):
    """The sum of the losses. Forward finds the gradients as well, while a part's logits are there."""

    @staticmethod
    def forward(ctx, head: nn.Module, targets: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
        training = any(ctx.needs_input_grad)
        inputs = (hidden, *weights)
        total, gradients = hidden.new_zeros((), dtype=torch.float32), [torch.zeros_like(x) for x in inputs]
        rows = max(1, LOGITS_AT_ONCE // head.out_features)
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            some = hidden[part].detach().requires_grad_(training)
            with torch.set_grad_enabled(training):
                logits = head(some.view_as(some))  # a view: the hooks of torch's FLOP counter cannot wait for a leaf
                loss = F.cross_entropy(logits.float(), targets[part], reduction="sum")
            total += loss.detach()
            if training:
                of_hidden, *of_weights = torch.autograd.grad(loss, (some, *weights))
                gradients[0][part] = of_hidden
                for whole, gradient in zip(gradients[1:], of_weights, strict=True):
                    whole += gradient
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        return None, None, *(gradient * scale for gradient in ctx.gradients)
