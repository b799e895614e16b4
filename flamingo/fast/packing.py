"""No work for padding.

Replaces: the padded batch (B, T_txt) inside the language model, while a loss is computed (`predict` of model/vlm.py).
Gains: see README, *What each piece is worth*.

What this file teaches: the texts of a batch differ in length, and what the shorter ones lack is filled with padding: a
third of a batch of captions. A transformer treats nearly all of it token by token (norms, matrix products,
activations), and none of that asks which text a token belongs to. So the real tokens of all texts lie end to end in one
row, (1, R, D), and only attention, where a text must not look into its neighbour, lays them out as (B, T_txt) for a
moment.

Letters: B texts, T_txt tokens of the longest, R real tokens of all texts together, K of them with a label.
"""

from dataclasses import dataclass, fields

import torch
from einops import rearrange
from torch import Tensor, nn

from flamingo.interop import compat
from flamingo.model.cross_attention import MediaMask
from flamingo.model.vlm import Text, next_tokens

# Language models, by `config.model_type`, that hand what else they are called with on to their attention, and whose
# attention needs no more of a token than its position. All others train on padded texts. (fast/enable.py compares.)
PACKABLE = ("opt", "gpt2", "gpt_neox", "llama")
ATTENTION = "packed_sdpa"  # transformers' own sdpa, but for a packed call


@dataclass
class TextLayout:
    """Where the real and the labelled tokens of a padded batch are.

    Made where the batch is (data/batches.py), on the CPU: to find places is to look at values, and on a GPU a wait.

    shape: (B, T_txt). places: (R,) the place of each real token among the B·T_txt. tokens: (B·T_txt,) the real token at
    each place (some or other one where there is padding). labelled: (K,) places from which a token with a label is
    predicted. targets: (K,) these tokens. on_the_right: padding stands behind the text only.
    """

    shape: tuple[int, int]
    places: Tensor
    tokens: Tensor
    labelled: Tensor
    targets: Tensor
    on_the_right: bool

    @classmethod
    def of(cls, labels: Tensor, attention_mask: Tensor | None) -> "TextLayout":
        """labels, attention_mask: (B, T_txt); no mask: no padding."""
        real = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        targets = next_tokens(labels).flatten()
        labelled = (targets != -100).nonzero()[:, 0]
        return cls(
            shape=tuple(real.shape),
            places=real.flatten().nonzero()[:, 0],
            tokens=(real.flatten().cumsum(0) - 1).clamp(min=0),
            labelled=labelled,
            targets=targets[labelled],
            on_the_right=bool((real[:, :-1] >= real[:, 1:]).all()),
        )

    def apply(self, move) -> "TextLayout":
        """The same with `move` done to every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return TextLayout(**{name: move(v) if isinstance(v, Tensor) else v for name, v in values.items()})

    def pack(self, x: Tensor) -> Tensor:
        """(B, T_txt, …) → (1, R, …)."""
        return x.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, R, …) → (B, T_txt, …); in the place of padding is some token or other, which nobody may look at."""
        return x[0].index_select(0, self.tokens).unflatten(0, self.shape)


@dataclass
class PackedMediaMask(MediaMask):
    """Who sees what (B, T_txt), in a call whose tokens lie end to end."""

    layout: TextLayout | None = None


class PackedTextsMixin:
    """For a `VisionLanguageModel` with `ChunkedLossMixin`: its hidden states, without work for padding."""

    def labelled_hidden_states(self, text: Text, layout: TextLayout) -> Tensor:
        if text.input_ids is None or not layout.on_the_right or len(layout.places) == len(layout.tokens):
            return super().labelled_hidden_states(text, layout)  # nothing to gain, or padding on the left
        lm = self.lang_encoder
        media_mask = lm.condition_on_text(text.input_ids)  # base_model below goes around the mixin, which does this
        if media_mask is not None:
            for layer in lm._get_decoder_layers():
                layer.condition_media_locations(PackedMediaMask(**vars(media_mask), layout=layout))
        positions = torch.arange(layout.shape[1], device=text.input_ids.device).expand(layout.shape)
        # A mask of one row of R tokens would be (R, R), and nobody reads it: a model makes none if it is given one.
        nothing = torch.zeros(1, 1, 1, 1, device=text.input_ids.device)
        packed = {"input_ids": layout.pack(text.input_ids), "position_ids": layout.pack(positions)}
        hidden = lm.base_model(**packed, attention_mask=nothing, use_cache=False, layout=layout).last_hidden_state
        return hidden[0].index_select(0, layout.tokens.index_select(0, layout.labelled))  # (R, D) → (K, D)


class PackedQueriesMixin:
    """For a `MaskedCrossAttention`: queries that lie end to end."""

    def attend(self, queries: Tensor, keys_values: tuple[Tensor, Tensor], media_mask: MediaMask) -> Tensor:
        layout = getattr(media_mask, "layout", None)
        if layout is None:
            return super().attend(queries, keys_values, media_mask)
        return layout.pack(super().attend(layout.unpack(queries), keys_values, media_mask))


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    layout: TextLayout | None = None, **options,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of a decoder layer, in the form transformers asks for: query (B, h, T_txt, c) → (B, T_txt, h, c).

    With a layout, the queries, keys and values of all texts lie in one row, (1, h, R, c). No mask is needed then:
    attention is causal, and padding is behind all that is real.
    """
    if layout is None:
        return compat.sdpa(module, query, key, value, attention_mask, **options), None
    rows = (layout.unpack(rearrange(t, "1 h R c -> 1 R h c")) for t in (query, key, value))
    query, key, value = (rearrange(t, "B t h c -> B h t c") for t in rows)
    return layout.pack(compat.sdpa(module, query, key, value, None, **options)), None  # (1, R, h, c)


def can_pack(lm: nn.Module) -> bool:
    return lm.config.model_type in PACKABLE and compat.attention_name(lm) in ("sdpa", ATTENTION)


compat.register_attention(ATTENTION, packed_attention)
