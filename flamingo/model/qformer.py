"""The Q-Former: queries that talk to each other, and in every second layer look at the picture.

What this file teaches: BLIP-2's vision tokenizer does what the Perceiver resampler does, a fixed number of latents out
of any number of patches, with the parts of BERT: the queries attend to each other, then (in every second layer) to the
patches, then go through a feed-forward, each with its norm behind it. In the resampler the latents join the patches as
keys; here the two attentions are separate. The transformer is transformers' own `Blip2QFormerModel`; what is ours is
what goes in and what comes out.

    (N, F, v, d) features  →  (N, n, d') latents        n queries; d' the width of the Q-Former, or of what reads it
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from flamingo.config import QFormerConfig
from flamingo.errors import InputError


class QFormer(nn.Module):
    """Turns patch features into `num_latents` latents.

    Args:
        dim: width d of the features. dim_out: width of the latents; None leaves them as wide as the Q-Former.
        **settings: the fields of `QFormerConfig`.

    Raises:
        InputError: its width is not a multiple of its heads.
    """

    def __init__(self, *, dim: int, dim_out: int | None = None, **settings):
        super().__init__()
        config = QFormerConfig(**settings)
        if config.width % config.heads:
            raise InputError(f"qformer.width {config.width} must be a multiple of qformer.heads {config.heads}")
        self.num_latents, self.dim = config.num_latents, dim_out or config.width
        # The norm that comes next takes their length away, but the longer they are, the less a step of Adam turns them:
        # from BERT's 0.02 it is a tenth at a learning rate of 2e-3, and one seed of three stayed on a plateau.
        self.query_tokens = nn.Parameter(torch.randn(1, config.num_latents, config.width))
        self.frame_embs = nn.Parameter(torch.randn(config.max_num_frames, dim)) if config.max_num_frames else None
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(
            hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
            intermediate_size=config.ff_mult * config.width, encoder_hidden_size=dim,
            cross_attention_frequency=config.every, hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
        ))  # fmt: skip
        # At BERT's 0.02 every query of a narrow Q-Former sees the same at first, the mean of all patches, and with some
        # seeds they never tell the things in a picture apart.
        with torch.no_grad():
            for layer in self.qformer.encoder.layer:
                if layer.has_cross_attention:
                    layer.crossattention.attention.query.weight.mul_(config.query_gain)
        self.projection = None if dim_out is None else nn.Linear(config.width, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, F, v, d) → (N, n, d'). Raises ValueError for more frames than have an embedding."""
        if self.frame_embs is not None:
            if x.shape[1] > len(self.frame_embs):
                raise ValueError(f"{x.shape[1]} frames, but the Q-Former knows {len(self.frame_embs)} only")
            x = x + rearrange(self.frame_embs[: x.shape[1]], "F d -> F 1 d")
        x = rearrange(x, "N F v d -> N (F v) d")  # a video is a longer list of patches
        queries = self.query_tokens.expand(len(x), -1, -1)  # (N, n, width of the Q-Former)
        latents = self.qformer(query_embeds=queries, encoder_hidden_states=x).last_hidden_state
        return latents if self.projection is None else self.projection(latents)
