"""The captions of a picture are the queries of one attention.

Replaces: `MaskedCrossAttention.attend`, where each text copies its picture's keys and values out of the bank.
Gains: see README, *What each piece is worth*.

What this file teaches: attention does not ask which text a query belongs to. Where K texts of one picture each stand
side by side (five captions of a picture, the beams of a search), their tokens are one long list of queries,
(N, h, K·T_txt, c) to (N, h, n, c), and no text needs a copy. Whether they stand so is known where the batch is made:
`texts_per_image`.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flamingo.model.cross_attention import MediaMask


class GroupedMixin:
    """For a `MaskedCrossAttention`."""

    def attend(self, queries: Tensor, keys_values: tuple[Tensor, Tensor], media_mask: MediaMask) -> Tensor:
        """(B, T_txt, h·c) → (B, T_txt, h·c)."""
        texts = media_mask.texts_per_image
        if texts is None:
            return super().attend(queries, keys_values, media_mask)
        q = rearrange(queries, "(N K) t (h c) -> N h (K t) c", h=self.heads, K=texts)
        out = F.scaled_dot_product_attention(q, *keys_values)
        return rearrange(out, "N h (K t) c -> (N K) t (h c)", K=texts).masked_fill(~media_mask.sees_image, 0.0)
