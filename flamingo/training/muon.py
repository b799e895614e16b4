"""Muon: a step that turns every direction of a matrix by as much.

What this file teaches: a step of training need not follow the gradient. The gradient of a matrix, G = U S Vᵀ, is large
in the few directions that most examples ask for and small in all others, and so are the steps of AdamW. Muon steps by
U Vᵀ: what few examples ask for is learned as fast. In the classroom a map from what is seen to names is learned from
135 things. With AdamW it holds for half of the 15 others, with Muon for most (assets/classroom/EXPERIMENTS.md).

Sources: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the size of a step:
J. Liu et al., "Muon is Scalable for LLM Training" (2025). torch.optim.Muon (torch 2.9) is the same, for matrices only.
"""

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
            for parameter in group["params"] if group.get("muon") else ():
                if parameter.grad is not None:
                    self._turn(parameter, group)
                    parameter.grad = None  # AdamW leaves out what has none
        super().step()

    def _turn(self, weight: Tensor, group: dict) -> None:
        """One step of a matrix (out, in), with Nesterov's momentum and weight decay."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())  # without one AdamW takes its state for damaged
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].mul_(MOMENTUM).add_(weight.grad)
        direction = orthogonal(weight.grad.add(state["momentum"], alpha=MOMENTUM))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"] * SIZE * max(weight.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """U S Vᵀ (a, b) → about U Vᵀ: its singular values become 0.7 to 1.2, whatever they were.

    By Newton and Schulz's iteration: with X Xᵀ one can compute an odd polynomial of the singular values without knowing
    them, here f(s) = αs + βs³ + γs⁵, which round by round drives them towards 1. bfloat16 is precise enough.
    """
    x = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.bfloat16().T
    x = x / x.norm().clamp(min=1e-7)  # now no singular value is above 1
    α, β, γ = COEFFICIENTS
    for _ in range(ROUNDS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=β, alpha=γ), x, beta=α)
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).to(matrix.dtype)
