"""Gated cross-attention: how text looks at pictures, and how it starts by not looking.

What this file teaches, in three steps:

1. Who sees what, `media_attention_mask`: a text token attends to one picture, the last one that was mentioned before
   it; a token before the first picture attends to none. (`mask_of_next_tokens` is the same rule for tokens that
   follow a text already read; nothing else knows it.)
2. `MaskedCrossAttention`: queries from the text, keys and values from the picture's latents, that rule as the mask.
3. `GatedCrossAttentionBlock`: attention and a feed-forward, each behind tanh(gate), and the gates start at 0. So a
   fresh block changes nothing: the language model it is put into is still, bit for bit, the one it was.

Letters: B texts, T_txt tokens, D text width; N pictures in the bank, n latents each, d wide; T_img picture slots of a
text; h heads, c channels of a head. (Flamingo paper, section 3.1.2 and figure 4.)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo.config import BlockConfig
from flamingo.interop import compat
from flamingo.model.resampler import feed_forward


@dataclass
class Images:
    """The pictures of a batch: a bank, and who points at it. *Encode once, index many*: five captions of one picture,
    the beams of a search and the steps of a decode never encode, resample or project the same picture twice.

    latents: (N, n, d) the bank. image_index: (B, T_img) rows of the bank in the text's order; -1 for an empty slot, and
        these come last.
    texts_per_image: K if the texts stand in the bank's order, K to each picture (index 0 0 0 1 1 1 …); None if that is
        not known. It is known where the index is made and never looked up in it: on a GPU a look is a wait.
    """

    latents: Tensor
    image_index: Tensor
    texts_per_image: int | None = None


@dataclass
class MediaMask:
    """Who sees what in one call of the language model: worked out once, used by every layer.

    image_index: (B, T_img) which picture of the bank stands in each slot (0 where the slot is empty: never seen).
    mask: (B, T_txt, T_img) may this token look at this slot? None if every token sees slot 0 or nothing.
    sees_image: (B, T_txt, 1) does the token see any picture at all? Its attention is exactly 0 if not.
    texts_per_image: that of `Images` times the beams. Nothing in this file needs it; fast/grouped_attention.py does.
    """

    image_index: Tensor
    mask: Tensor | None
    sees_image: Tensor
    texts_per_image: int | None = None


def media_attention_mask(media_locations: Tensor, image_index: Tensor, only_immediate: bool = True) -> MediaMask:
    """The masking rule of Flamingo: who sees what.

    `text_time` counts the <image> tokens up to and including a token: 0 before the first picture, 1 from the first
    <image> on, and so on. A token sees the picture whose number equals its time (only_immediate, the paper's
    choice), or all pictures up to its time.

    Args:
        media_locations: (B, T_txt) bool, True at <image> tokens.
        image_index: (B, T_img) pictures of each text in order, as rows of the bank; -1 for an empty slot.

    Raises:
        ValueError: a text has more <image> tokens than pictures.
    """
    text_time = media_locations.cumsum(dim=1)  # (B, T_txt)
    count = (image_index >= 0).sum(dim=1)  # (B,) pictures of each text; the filled slots come first
    too_many = lambda i: (  # noqa: E731
        f"text {i} has {int(text_time[i, -1])} <image> tokens but {int(count[i])} pictures: "
        "give one picture for each <image>"
    )
    compat.check_values(text_time[:, -1] <= count, too_many)
    image_time = torch.arange(1, image_index.shape[1] + 1, device=image_index.device)  # (T_img,)
    seen = text_time[:, :, None] >= image_time  # (B, T_txt, T_img): the token is behind this slot's <image>
    if only_immediate:
        seen = text_time[:, :, None] == image_time
    one_slot = image_index.shape[1] == 1
    return MediaMask(image_index.clamp(min=0), None if one_slot else seen, (text_time > 0)[:, :, None])


def mask_of_next_tokens(images_read: Tensor, image_index: Tensor, only_immediate: bool = True) -> MediaMask:
    """What further tokens see once a text has been read: its last picture, or all so far. (No <image> is generated.)

    images_read: (B,) <image> tokens of each text. image_index: (B, T_img) as above.
    """
    sees_image = rearrange(images_read > 0, "B -> B 1 1")
    image_index = image_index.clamp(min=0)
    if only_immediate:
        last = image_index.gather(1, (images_read - 1).clamp(min=0)[:, None])  # (B, 1)
        return MediaMask(last, None, sees_image)
    image_time = torch.arange(1, image_index.shape[1] + 1, device=image_index.device)
    return MediaMask(image_index, rearrange(images_read[:, None] >= image_time, "B T -> B 1 T"), sees_image)


class MaskedCrossAttention(nn.Module):
    """Text attends to the latents of its picture.

    Args:
        dim, dim_visual: D of the text and d of the latents.
        dim_head, heads: attention geometry.
    """

    def __init__(self, *, dim: int, dim_visual: int, dim_head: int = 64, heads: int = 8):
        super().__init__()
        self.heads = heads
        inner = dim_head * heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim_visual, inner * 2, bias=False)  # first half keys, second half values
        self.to_out = nn.Linear(inner, dim, bias=False)

    def project_media(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every picture, once: (N, n, d) → two of (N, h, n, c)."""
        k, v = self.to_kv(media).chunk(2, dim=-1)
        return tuple(rearrange(t, "N n (h c) -> N h n c", h=self.heads) for t in (k, v))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], media_mask: MediaMask) -> Tensor:
        """x (B, T_txt, D), keys and values of the bank (N, h, n, c) each → (B, T_txt, D)."""
        queries = self.to_q(self.norm(x))  # (B, T_txt, h·c)
        return self.to_out(self.attend(queries, keys_values, media_mask))

    def attend(self, queries: Tensor, keys_values: tuple[Tensor, Tensor], media_mask: MediaMask) -> Tensor:
        """(B, T_txt, h·c) → (B, T_txt, h·c)."""
        q, k, v, mask = self.attention_inputs(queries, keys_values, media_mask)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, h, T_txt, c)
        return rearrange(out, "B h t c -> B t (h c)").masked_fill(~media_mask.sees_image, 0.0)

    def attention_inputs(
        self, queries: Tensor, keys_values: tuple[Tensor, Tensor], media_mask: MediaMask
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries (B, h, T_txt, c), keys and values (B, h, T_img·n, c), and who may look where (B, 1, T_txt, T_img·n),
        None for everywhere."""
        q = rearrange(queries, "B t (h c) -> B h t c", h=self.heads)
        # Each text picks its pictures from the bank and lays their latents side by side.
        k, v = (rearrange(t[media_mask.image_index], "B T h n c -> B h (T n) c") for t in keys_values)
        if media_mask.mask is None:
            return q, k, v, None
        # A row that may look nowhere would be 0/0: let it look everywhere, `attend` drops what it saw.
        allowed = media_mask.mask | ~media_mask.sees_image
        latents = keys_values[0].shape[2]  # n
        return q, k, v, allowed.repeat_interleave(latents, dim=2)[:, None]


class GatedCrossAttentionBlock(nn.Module):
    """x + tanh(attn_gate) · attention(x, picture), then x + tanh(ff_gate) · feed_forward(x).

    Text before the first picture gets nothing from the attention; its feed-forward still runs, as in the paper's code.

    Args:
        dim, dim_visual: D of the text and d of the latents.
        **settings: the fields of `BlockConfig`.
    """

    def __init__(self, *, dim: int, dim_visual: int, **settings):
        super().__init__()
        config = BlockConfig(**settings)
        self.attn = MaskedCrossAttention(dim=dim, dim_visual=dim_visual, dim_head=config.dim_head, heads=config.heads)
        with torch.no_grad():
            self.attn.to_out.weight.mul_(config.init_gain)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(dim, config.ff_mult, config.act)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None, media_mask: MediaMask | None) -> Tensor:
        """x (B, T_txt, D) → (B, T_txt, D). Without pictures (None, None) only the feed-forward acts."""
        if keys_values is not None:
            x = x + self.attn_gate.tanh() * self.attn(x, keys_values, media_mask)
        return x + self.ff_gate.tanh() * self.ff(x)
