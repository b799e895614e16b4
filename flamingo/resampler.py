"""The Perceiver resampler: any number of patch features in, a fixed number of latents out.

What this file teaches: how Flamingo (section 3.1.1 of the paper) makes the language model's work independent of
how large a picture or how long a video is. A few learned vectors, the *latents*, ask questions of the patch
features by attention; after some layers they are the picture, as far as the language model will ever see it.

    (N, F, v, d)  features of N pictures, F frames each (1 for a still), v patches a frame, d wide
 →  (N, n, d)     n latents a picture, whatever F and v were

Letters: h heads, k = F v patch tokens of one picture.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


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

    Args (names of open_flamingo and flamingo-pytorch, so that their weights fit):
        dim: width d of the features and of the latents.
        depth: number of layers, each an attention and a feed-forward, both with a residual.
        dim_head, heads: attention geometry.
        num_latents: n, latents per picture.
        max_num_frames: learn an embedding for each of this many frames (video); None learns none.
        max_num_media: learn an embedding for a picture's place among the pictures of its text; None learns none.
        ff_mult, act: feed-forward width factor and activation (gelu, relu or sqrelu).
        init_gain, query_gain, latents_std: how the weights begin. The learned latents are the same for every picture,
            and what attention adds to them is what differs: at 1 and 1 at first a tenth of the whole (init_gain,
            latents_std). And attention begins all but uniform, so that every latent holds the same mean of all
            patches; with larger queries each begins with a look of its own (query_gain).
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        max_num_frames: int | None = None,
        max_num_media: int | None = None,
        ff_mult: int = 4,
        act: str = "gelu",
        init_gain: float = 1.0,
        query_gain: float = 1.0,
        latents_std: float = 1.0,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * latents_std)
        self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim)) if max_num_frames else None
        self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim)) if max_num_media else None
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads), feed_forward(dim, ff_mult, act)]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        with torch.no_grad():
            for attention, _ in self.layers:
                attention.to_out.weight.mul_(init_gain)
                attention.to_q.weight.mul_(query_gain)

    def forward(self, x: Tensor, media_time: Tensor | None = None) -> Tensor:
        """Patch features to latents.

        Args:
            x: (N, F, v, d) features.
            media_time: (N,) which place each picture has among the pictures of its text, from 0;
                needed if and only if the module has `max_num_media`.

        Returns:
            (N, n, d) latents.

        Raises:
            ValueError: x is not 4-dimensional, has more frames than there are frame embeddings, or a picture's
                place is unknown or beyond `max_num_media`.
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
        """Tell the patches which frame they are from, and which picture of the text."""
        if self.frame_embs is not None:
            frames, known = x.shape[1], len(self.frame_embs)
            if frames > known:
                raise ValueError(f"{frames} frames, but the resampler has time embeddings for {known} only")
            x = x + rearrange(self.frame_embs[:frames], "F d -> F 1 d")
        if self.media_time_embs is not None:
            known = len(self.media_time_embs)
            if media_time is None:
                raise ValueError(
                    "a resampler with media time embeddings must be told each picture's place (media_time)"
                )
            if media_time.numel() and int(media_time.max()) >= known:
                raise ValueError(f"a text has picture number {int(media_time.max()) + 1}, but max_num_media is {known}")
            x = x + rearrange(self.media_time_embs[media_time], "N 1 d -> N 1 1 d")
        return x
