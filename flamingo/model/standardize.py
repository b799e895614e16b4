"""Features each of whose channels has mean 0 and deviation 1.

What this file teaches: what a picture has in common with all others tells nothing about it. CLIP's features come out
of a norm; those of a network trained to name classes come out of a rectifier, most of their length is the same for
every picture, and a resampler that has to find the rest by itself needs many steps for it. So each channel is shifted
and scaled, and both begin with what a few training pictures say. (Data-dependent initialisation, as "actnorm" in Kingma
and Dhariwal 2018, Glow. They are trained and saved as all else that was added.)
"""

import torch
from torch import Tensor, nn

LEAST = 0.05  # added to the deviation: a channel that never moves is not blown up


class StandardizeMixin:
    """A vision tokenizer that standardizes its features first. Call `init_standardize` once it has it."""

    def init_standardize(self, dim: int) -> None:
        """dim: d of the features."""
        self.feature_shift = nn.Parameter(torch.zeros(dim))
        self.feature_scale = nn.Parameter(torch.ones(dim))

    @torch.no_grad()
    def fit_features(self, features: Tensor) -> None:
        """features: (N, F, v, d) of training pictures. Shift and scale become theirs."""
        flat = features.float().flatten(0, 2)
        self.feature_shift.copy_(flat.mean(dim=0))
        self.feature_scale.copy_(1 / (flat.std(dim=0) + LEAST))

    def forward(self, x: Tensor, *rest) -> Tensor:
        """x (N, F, v, d) → (N, n, d)."""
        return super().forward((x - self.feature_shift) * self.feature_scale, *rest)
