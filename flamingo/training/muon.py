"""Muon: a step that turns every direction of a matrix by as much.

What this file teaches: a step of training need not follow the gradient. The gradient of a matrix, G = U S Vᵀ, is large
in the few directions that most examples ask for and small in all others, and so are the steps of AdamW. Muon steps by
U Vᵀ: what few examples ask for is learned as fast. In the classroom a map from what is seen to names is learned from
135 things. With AdamW it holds for half of the 15 others, with Muon for most (assets/classroom/EXPERIMENTS.md).

Sources: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the size of a step:
J. Liu et al., "Muon is Scalable for LLM Training" (2025). torch.optim.Muon (torch 2.9) is the same, for matrices only.
"""

from collections import defaultdict

import torch
from torch import Tensor

MOMENTUM = 0.95
ROUNDS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of the first source: steep at 0, so that few rounds are enough
SIZE = 0.2  # of a step of Muon, as a number: about that of AdamW's, so that both take the same learning rate


class MuonAdamW(torch.optim.AdamW):
    """Muon for the groups with "muon": True, AdamW for all others. One optimizer, so one state to keep and resume."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)  # of one shape: many small products are done sooner together
            for weight in group["params"] if group.get("muon") else ():
                if weight.grad is not None:
                    alike[weight.shape].append(weight)
            for weights in alike.values():
                self._turn(weights, group)
        super().step()

    def _turn(self, weights: list[Tensor], group: dict) -> None:
        """One step of matrices (out, in), with weight decay."""
        directions = orthogonal(torch.stack([self._momentum(weight) for weight in weights]))
        size = SIZE * max(weights[0].shape) ** 0.5
        for weight, direction in zip(weights, directions, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * size)
            weight.grad = None  # AdamW leaves out what has none

    def _momentum(self, weight: Tensor) -> Tensor:
        """The gradients so far, the newest counting twice (Nesterov)."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # without one AdamW takes its state for damaged
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].mul_(MOMENTUM).add_(weight.grad)
        return weight.grad.add(state["momentum"], alpha=MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """Each U S Vᵀ of (k, a, b) → about U Vᵀ: its singular values become 0.7 to 1.2, whatever they were.

    By Newton and Schulz's iteration: with X Xᵀ one can compute an odd polynomial of the singular values without knowing
    them, here f(s) = αs + βs³ + γs⁵, which round by round drives them towards 1. bfloat16 is precise enough.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT).mT  # X Xᵀ is the smaller product of both
    x = matrices.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # now no singular value is above 1
    α, β, γ = COEFFICIENTS
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=β, alpha=γ), x, beta=α)
    return x.to(matrices.dtype)
