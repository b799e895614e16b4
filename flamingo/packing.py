"""No work for padding.

What this file teaches: the texts of a batch differ in length, and what the shorter ones lack is filled with padding: a
third of a batch of captions. A transformer treats nearly all of it token by token (norms, matrix products,
activations), and none of that asks which text a token belongs to. So while a loss is computed the real tokens of all
texts lie end to end in one row, (1, R, D), and only attention, where a text must not look into its neighbour, lays
them out as (B, T_txt) for a moment.

Letters: B texts, T_txt tokens of the longest, R real tokens of all texts together.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from flamingo.interop import compat

# Language models, by `config.model_type`, that hand what else they are called with on to their attention, and whose
# attention needs no more of a token than its position. All others train on padded texts.
PACKABLE = ("opt", "gpt2", "gpt_neox", "llama")
ATTENTION = "packed_sdpa"  # transformers' own sdpa, but for a packed call


class Packing:
    """Where the real tokens of a padded batch are.

    Args:
        attention_mask: (B, T_txt), padded on the right.
    """

    def __init__(self, attention_mask: Tensor):
        real = attention_mask.bool()
        self.shape = real.shape  # (B, T_txt)
        self.places = real.flatten().nonzero()[:, 0]  # (R,) the place of each token among the B·T_txt
        self.tokens = (real.flatten().cumsum(0) - 1).clamp(min=0)  # (B·T_txt,) the token at each place

    def pack(self, x: Tensor) -> Tensor:
        """(B, T_txt, …) → (1, R, …)."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, R, …) → (B, T_txt, …); in the place of padding is some token or other, which nobody may look at."""
        return x[0].index_select(0, self.tokens).unflatten(0, self.shape)

    def inputs(self, input_ids: Tensor) -> dict:
        """What the language model is called with for texts (B, T_txt): their tokens end to end, and their positions.

        The mask of one row of R tokens would be (R, R), and nobody reads it: a model makes none if it is given one.
        """
        positions = torch.arange(self.shape[1], device=input_ids.device).expand(self.shape)
        nothing = torch.zeros(1, 1, 1, 1, device=input_ids.device)
        texts = {"input_ids": self.pack(input_ids), "position_ids": self.pack(positions), "attention_mask": nothing}
        return texts | {"packing": self}  # which the model hands on to `packed_attention`


def packing_of(attention_mask: Tensor | None, lm: nn.Module) -> Packing | None:
    """None if there is nothing to gain, or the language model cannot be called so: see `allow_packing`."""
    if attention_mask is None or compat.attention_name(lm) != ATTENTION:
        return None
    real = attention_mask.bool()
    on_the_right = bool((real[:, :-1] >= real[:, 1:]).all())
    return Packing(attention_mask) if on_the_right and not real.all() else None


def allow_packing(lm: nn.Module) -> None:
    """Let the language model be called with texts laid end to end, if it is one of `PACKABLE` with sdpa attention."""
    if lm.config.model_type in PACKABLE and compat.attention_name(lm) == "sdpa":
        compat.set_attention(lm, ATTENTION)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    packing: Packing | None = None, **options,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of a decoder layer, in the form transformers asks for: query (B, h, T_txt, c) → (B, T_txt, h, c).

    With a packing, the queries, keys and values of all texts lie in one row, (1, h, R, c). No mask is needed then:
    attention is causal, and padding is behind all that is real.
    """
    if packing is None:
        return compat.sdpa(module, query, key, value, attention_mask, **options), None
    rows = (packing.unpack(rearrange(t, "1 h R c -> 1 R h c")) for t in (query, key, value))
    query, key, value = (rearrange(t, "B t h c -> B h t c") for t in rows)
    out = compat.sdpa(module, query, key, value, None, **options)  # (B, T_txt, h, c)
    return packing.pack(out), None


compat.register_attention(ATTENTION, packed_attention)
