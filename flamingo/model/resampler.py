"""The Perceiver resampler: any number of patch features in, a fixed number of latents out.

What this file teaches: how Flamingo (section 3.1.1 of the paper) makes the language model's work independent of
how large a picture or how long a video is. A few learned vectors, the *latents*, are the queries of an attention to
the patch features; after some layers they are the picture, as far as the language model will ever see it.

    (N, F, v, d)  features of N pictures, F frames each (1 for a still), v patches a frame, d wide
 →  (N, n, d)     n latents a picture, whatever F and v were

Letters: h heads, k = F v patch tokens of one picture.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from flamingo.config import ResamplerConfig


class SquaredReLU(nn.Module):
    """max(x, 0)²: the activation of the published flamingo-mini models (So et al. 2021, Primer)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "sqrelu": SquaredReLU}


def feed_forward(dim: int, mult: int = 4, act: str = "gelu") -> nn.Sequential:
    """LayerNorm, widen `mult` times, activation, narrow again; no biases, as in the paper's code.

    Raises ValueError for an activation that is not gelu, relu or sqrelu.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}: choose one of {', '.join(ACTIVATIONS)}")
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        ACTIVATIONS[act](),
        nn.Linear(dim * mult, dim, bias=False),
    )


class PerceiverAttention(nn.Module):
    """The latents attend to the patches *and to each other*: both contribute keys and values."""

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8):
        super().__init__()
        self.heads = heads
        inner = dim_head * heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)  # first half keys, second half values
        self.to_out = nn.Linear(inner, dim, bias=False)

    def queries_keys_values(self, x: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, k, d), latents (N, n, d) → queries (N, h, n, c), keys and values (N, h, k + n, c)."""
        x, latents = self.norm_media(x), self.norm_latents(latents)
        q = self.to_q(latents)  # (N, n, h·dim_head)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)  # (N, k + n, h·dim_head) each
        return tuple(rearrange(t, "N t (h c) -> N h t c", h=self.heads) for t in (q, k, v))

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """x (N, k, d), latents (N, n, d) → (N, n, d)."""
        q, k, v = self.queries_keys_values(x, latents)
        out = F.scaled_dot_product_attention(q, k, v)  # (N, h, n, dim_head)
        return self.to_out(rearrange(out, "N h n c -> N n (h c)"))


class PerceiverResampler(nn.Module):
    """Turns patch features into `num_latents` latents.

    Args:
        dim: width d of the features and of the latents.
        **settings: the fields of `ResamplerConfig` (names of open_flamingo and flamingo-pytorch).
    """

    def __init__(self, *, dim: int, **settings):
        super().__init__()
        config = ResamplerConfig(**settings)
        self.dim, self.num_latents = dim, config.num_latents
        self.latents = nn.Parameter(torch.randn(config.num_latents, dim) * config.latents_std)
        frames, media = config.max_num_frames, config.max_num_media
        self.frame_embs = nn.Parameter(torch.randn(frames, dim)) if frames else None
        self.media_time_embs = nn.Parameter(torch.randn(media, 1, dim)) if media else None
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim=dim, dim_head=config.dim_head, heads=config.heads),
                           feed_forward(dim, config.ff_mult, config.act)])
            for _ in range(config.depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim)
        with torch.no_grad():
            for attention, _ in self.layers:
                attention.to_out.weight.mul_(config.init_gain)
                attention.to_q.weight.mul_(config.query_gain)

    def forward(self, x: Tensor, media_time: Tensor | None = None) -> Tensor:
        """Patch features → latents (N, n, d).

        Args:
            x: (N, F, v, d) features.
            media_time: (N,) which place each picture has among the pictures of its text, from 0 and below
                `max_num_media`; needed if and only if that is not 0.

        Raises:
            ValueError: x is not 4-dimensional, has more frames than there are frame embeddings, or no place of the
                pictures is given.
        """
        if x.ndim != 4:
            raise ValueError(f"the resampler takes features (N, F, v, d), not a tensor of shape {tuple(x.shape)}")
        x = self._add_time(x, media_time)
        x = rearrange(x, "N F v d -> N (F v) d")  # a video is a longer list of patches
        latents = repeat(self.latents, "n d -> N n d", N=x.shape[0])
        for attention, ff in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + ff(latents)
        return self.norm(latents)

    def _add_time(self, x: Tensor, media_time: Tensor | None) -> Tensor:
        """Mark the patches by the frame they are from, and by the place of their picture in the text."""
        if self.frame_embs is not None:
            frames, known = x.shape[1], len(self.frame_embs)
            if frames > known:
                raise ValueError(f"{frames} frames, but the resampler has time embeddings for {known} only")
            x = x + rearrange(self.frame_embs[:frames], "F d -> F 1 d")
        if self.media_time_embs is not None:
            if media_time is None:
                raise ValueError("a resampler with media time embeddings needs each picture's place (media_time)")
            x = x + rearrange(self.media_time_embs[media_time], "N 1 d -> N 1 1 d")
        return x
