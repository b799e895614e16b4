"""Gated cross-attention: how text looks at pictures, and how it starts by not looking.

What this file teaches, in three steps:

1. `who_sees_what`: a text token attends to one picture, the last one that was mentioned before it; a token before
   the first picture attends to none. This function alone knows the rule.
2. `MaskedCrossAttention`: queries from the text, keys and values from the picture's latents, that rule as the mask.
3. `GatedCrossAttentionBlock`: attention and a feed-forward, each behind tanh(gate), and the gates start at 0. So a
   fresh block changes nothing: the language model it is put into is still, bit for bit, the language model it was.

Letters: B texts, T_txt tokens, D text width; N pictures in the bank, n latents each, d wide; T_img picture slots of a
text; h heads, c channels of a head. (Flamingo paper, section 3.1.2 and figure 4.)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo.packing import Packing
from flamingo.resampler import feed_forward


@dataclass
class Sight:
    """Who sees what in one batch, worked out once and used by every layer.

    image_index: (B, T_img) which picture of the bank stands in each slot (0 where the slot is empty: never seen).
    mask: (B, T_txt, T_img) may this token look at this slot? None if every token sees slot 0 or nothing.
    sees_image: (B, T_txt, 1) does the token see any picture at all? Its attention is exactly 0 if not.
    captions_each: see `captions_each`.
    packing: if the tokens of all texts lie end to end, where each belongs.
    """

    image_index: Tensor
    mask: Tensor | None
    sees_image: Tensor
    captions_each: int = 0
    packing: Packing | None = None

    def last(self, tokens: int) -> "Sight":
        """The same for the last `tokens` of each text only: those before have been read in an earlier call."""
        mask = None if self.mask is None else self.mask[:, -tokens:]
        return Sight(self.image_index, mask, self.sees_image[:, -tokens:], self.captions_each)


def captions_each(image_index: Tensor) -> int:
    """K, if every text has one picture and the texts stand in the order of the bank, K to each picture (0 0 0 1 1 1 …);
    else 0. So it is when the captions of a picture are trained on together, and for the beams of a search: their
    tokens can then ask a picture all at once, and its keys need no copy for each of them."""
    texts, slots = image_index.shape
    each, rest = divmod(texts, int(image_index.max()) + 1)
    in_order = torch.arange(texts, device=image_index.device) // max(1, each)
    return each if slots == 1 and not rest and torch.equal(image_index[:, 0], in_order) else 0


def who_sees_what(media_locations: Tensor, image_index: Tensor, only_immediate: bool = True) -> Sight:
    """The masking rule of Flamingo.

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
    too_many = text_time[:, -1] > count
    if too_many.any():
        row = int(too_many.nonzero()[0])
        raise ValueError(
            f"text {row} has {int(text_time[row, -1])} <image> tokens but {int(count[row])} pictures: "
            "give one picture for each <image>"
        )
    image_time = torch.arange(1, image_index.shape[1] + 1, device=image_index.device)  # (T_img,)
    seen = text_time[:, :, None] >= image_time  # (B, T_txt, T_img): this slot or a later one
    if only_immediate:
        seen = text_time[:, :, None] == image_time
    image_index = image_index.clamp(min=0)
    return Sight(
        image_index=image_index,
        mask=None if image_index.shape[1] == 1 else seen,
        sees_image=(text_time > 0)[:, :, None],
        captions_each=captions_each(image_index),
    )


def sight_of_next_token(images_read: Tensor, image_index: Tensor, only_immediate: bool = True) -> Sight:
    """What further tokens see once a text has been read: its last picture, or all so far. (No <image> is generated.)

    images_read: (B,) <image> tokens of each text. image_index: (B, T_img) as above.
    """
    sees_image = rearrange(images_read > 0, "B -> B 1 1")
    image_index = image_index.clamp(min=0)
    if only_immediate:
        last = image_index.gather(1, (images_read - 1).clamp(min=0)[:, None])  # (B, 1)
        return Sight(last, None, sees_image, captions_each(last))
    image_time = torch.arange(1, image_index.shape[1] + 1, device=image_index.device)
    return Sight(image_index, rearrange(images_read[:, None] >= image_time, "B T -> B 1 T"), sees_image)


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

    def attention_inputs(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], sight: Sight
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries (B, h, T_txt, c), keys and values (B, h, T_img·n, c), and who may look where (B, 1, T_txt, T_img·n),
        None for everywhere."""
        q = rearrange(self._queries(x, sight), "B t (h c) -> B h t c", h=self.heads)
        # Each text picks its pictures from the bank and lays their latents side by side.
        k, v = (rearrange(t[sight.image_index], "B T h n c -> B h (T n) c") for t in keys_values)
        mask = None
        if sight.mask is not None:
            n = keys_values[0].shape[2]
            # A row that may look nowhere would be 0/0: let it look everywhere, and drop what it saw below.
            allowed = sight.mask | ~sight.sees_image
            mask = allowed.repeat_interleave(n, dim=2)[:, None]  # (B, 1, T_txt, T_img·n)
        return q, k, v, mask

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], sight: Sight) -> Tensor:
        """x (B, T_txt, D), keys and values of the bank (N, h, n, c) each → (B, T_txt, D). Packed, x is (1, R, D)."""
        if len(sight.sees_image) == sight.captions_each * len(keys_values[0]):
            out = self._ask_together(x, keys_values, sight)
        else:
            q, k, v, mask = self.attention_inputs(x, keys_values, sight)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, h, T_txt, c)
            out = rearrange(out, "B h t c -> B t (h c)")
        out = out.masked_fill(~sight.sees_image, 0.0)
        return self.to_out(out if sight.packing is None else sight.packing.pack(out))

    def _queries(self, x: Tensor, sight: Sight) -> Tensor:
        """(B, T_txt, h·c)."""
        q = self.to_q(self.norm(x))
        return q if sight.packing is None else sight.packing.unpack(q)

    def _ask_together(self, x: Tensor, keys_values: tuple[Tensor, Tensor], sight: Sight) -> Tensor:
        """The same where the texts of a picture stand side by side, K of them: their tokens are the queries of one
        attention, (N, h, K·T_txt, c) to (N, h, n, c), and no text needs a copy of its picture's keys."""
        each = sight.captions_each
        q = rearrange(self._queries(x, sight), "(N K) t (h c) -> N h (K t) c", h=self.heads, K=each)
        out = F.scaled_dot_product_attention(q, *keys_values)
        return rearrange(out, "N h (K t) c -> (N K) t (h c)", K=each)


class GatedCrossAttentionBlock(nn.Module):
    """x + tanh(attn_gate) · attention(x, picture), then x + tanh(ff_gate) · feed_forward(x).

    Text before the first picture gets nothing from the attention; its feed-forward still runs, as in the paper's
    code. ff_mult and act are those of `feed_forward`.

    init_gain scales what the attention adds at first. tanh(gate) is at most 1, so a block whose output is small beside
    the language model's hidden states has little to say even with its gate wide open, until its weights have grown.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        act: str = "gelu",
        init_gain: float = 1.0,
    ):
        super().__init__()
        self.attn = MaskedCrossAttention(dim=dim, dim_visual=dim_visual, dim_head=dim_head, heads=heads)
        with torch.no_grad():
            self.attn.to_out.weight.mul_(init_gain)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(dim, ff_mult, act)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor] | None, sight: Sight | None) -> Tensor:
        """x (B, T_txt, D) → (B, T_txt, D). Without pictures (None, None) only the feed-forward acts."""
        if keys_values is not None:
            x = x + self.attn_gate.tanh() * self.attn(x, keys_values, sight)
        return x + self.ff_gate.tanh() * self.ff(x)
