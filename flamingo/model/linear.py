"""The linear projection: every patch is a token, and one matrix brings it to the language model's width.

What this file teaches: the least that joins a picture to a text (LLaVA). No queries, no attention; what the language
model reads are the patches themselves, so the list is as long as the picture is large. *Pixel shuffle* (nanoVLM,
Idefics 3) shortens it without losing a number: 2 × 2 patches beside each other are laid one behind the other and become
one token, four times as wide, before the matrix.

    (N, F, v, d)  →  (N, F v / s², s² d)  →  (N, n, d')         s the side of the square, n = F v / s²
"""

import math

from einops import rearrange
from torch import Tensor, nn

from flamingo.config import LinearConfig
from flamingo.errors import InputError


def begin_as_large_as(projection: nn.Linear, std: float) -> None:
    """Fresh weights, with outputs of this standard deviation where inputs have 1, as behind a norm. (Token embeddings
    are small; latents ten times as large would be all that the first layers hear.)"""
    nn.init.normal_(projection.weight, std=std / math.sqrt(projection.in_features))
    nn.init.zeros_(projection.bias)


class LinearProjection(nn.Module):
    """Turns patch features into tokens, one for each patch or each square of patches.

    Args:
        dim: width d of the features. dim_out: width of the tokens; None leaves it at d.
        **settings: the fields of `LinearConfig`.

    Raises:
        InputError: the number of patches is not known, or they form no grid that such squares fit in.
    """

    def __init__(self, *, dim: int, dim_out: int | None = None, **settings):
        super().__init__()
        config = LinearConfig(**settings)
        self.shuffle, self.dim = config.shuffle, dim_out or dim
        if config.num_patches is None:
            raise InputError("the linear projection must know how many patches a picture has: set linear.num_patches")
        side = math.isqrt(config.num_patches)
        if config.shuffle > 1 and (side * side != config.num_patches or side % config.shuffle):
            raise InputError(
                f"linear.shuffle {config.shuffle}: {config.num_patches} patches form no square that squares of "
                f"{config.shuffle} by {config.shuffle} fill"
            )
        self.num_patches = config.num_patches
        self.num_latents = config.num_patches // config.shuffle**2  # of a still picture
        self.projection = nn.Linear(dim * config.shuffle**2, self.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, F, v, d) → (N, n, d'). The frames of a video follow each other. Raises ValueError for another number of
        patches than it was built for, where these form squares."""
        if self.shuffle > 1:
            if x.shape[2] != self.num_patches:
                raise ValueError(f"a picture of {x.shape[2]} patches, but linear.num_patches is {self.num_patches}")
            side = math.isqrt(x.shape[2]) // self.shuffle
            x = rearrange(x, "N F (h a w b) d -> N F (h w) (a b d)", h=side, a=self.shuffle, b=self.shuffle)
        return self.projection(rearrange(x, "N F v d -> N (F v) d"))
