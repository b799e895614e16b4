"""Extending a live language model: every decoder layer learns to look at pictures before it does its own work.

What this file teaches: how Flamingo gets into a Hugging Face model without changing a line of its source.

    lm = AutoModelForCausalLM.from_pretrained("facebook/opt-125m", dtype=torch.float32)
    extend_instance(lm, FlamingoLMMixin)          # the same object, of a new class with new abilities
    lm.init_flamingo(...)                         # each decoder layer becomes FlamingoLayer(cross-attention, layer)

    with lm.conditioned(latents, image_index):    # the pictures are laid beside the text, and taken away afterwards
        lm(input_ids=...)

Outside `conditioned` the model is the frozen language model it was, whatever has been trained. (The mixin and the
names of its methods follow open_flamingo.)
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flamingo.added_tokens import DecoupledEmbedding, DecoupledLinear
from flamingo.cross_attention import GatedCrossAttentionBlock, Sight, sight_of_next_token, who_sees_what
from flamingo.interop import compat
from flamingo.loss import loss_by_parts, mean_loss, next_tokens
from flamingo.packing import Packing, allow_packing, packing_of

# Where the decoder layers are, by `config.model_type`. Others are found by structure.
DECODER_LAYERS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "falcon": "transformer.h",
    "bloom": "transformer.h",
    "mpt": "transformer.blocks",
    "biogpt": "biogpt.layers",
}


def extend_instance(obj: nn.Module, mixin: type) -> None:
    """Give a live object the abilities of `mixin`: its class becomes a new one, made of the mixin and its old class."""
    base = type(obj)

    @functools.wraps(base.forward)  # transformers reads forward's signature to learn what generate() may pass
    def forward(self, *args, **kwargs):
        return mixin.forward(self, *args, **kwargs)

    body = {"forward": forward, "__module__": mixin.__module__, "__doc__": base.__doc__}
    obj.__class__ = type(f"Flamingo{base.__name__}", (mixin, base), body)


def find_decoder_layers(lm: nn.Module, attr_name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The dotted name and the ModuleList of a causal language model's decoder layers.

    By `attr_name` if given, by the table, or as the only ModuleList with as many entries as the config has layers.
    Raises ValueError, naming the option `decoder_layers_attr_name`, when none or several fit.
    """
    lists = {name: module for name, module in lm.named_modules() if isinstance(module, nn.ModuleList)}
    name = attr_name or DECODER_LAYERS.get(lm.config.model_type)
    if name in lists:
        return name, lists[name]
    if attr_name:
        raise ValueError(f"decoder_layers_attr_name={attr_name!r} is no ModuleList; this model has {', '.join(lists)}")
    fitting = [name for name, module in lists.items() if len(module) == lm.config.num_hidden_layers]
    if len(fitting) == 1:
        return fitting[0], lists[fitting[0]]
    raise ValueError(
        f"cannot tell which of {', '.join(lists) or 'no ModuleList'} holds the decoder layers of "
        f"{lm.config.model_type}: name it with decoder_layers_attr_name"
    )


def layers_with_cross_attention(count: int, every: int, placement: str = "near") -> list[int]:
    """Which of `count` layers get a cross-attention before them.

    near: the first of each group of `every` (flamingo-mini); far: the last of each group (open_flamingo).
    """
    if every < 1:
        raise ValueError(f"xattn_every must be at least 1, not {every}")
    if placement not in ("near", "far"):
        raise ValueError(f"xattn_placement must be near or far, not {placement!r}")
    offset = 0 if placement == "near" else 1
    return [i for i in range(count) if (i + offset) % every == 0]


class FlamingoLayer(nn.Module):
    """A gated cross-attention, then the decoder layer that was there before.

    It holds what it was conditioned on: the pictures (`vis_x`), who sees which (`sight`), and, while text is
    generated, their keys and values. Without conditioning it is the decoder layer alone.
    """

    def __init__(self, gated_cross_attn_layer: GatedCrossAttentionBlock, decoder_layer: nn.Module):
        super().__init__()
        self.gated_cross_attn_layer = gated_cross_attn_layer
        self.decoder_layer = decoder_layer
        self.gradient_checkpointing = False  # forget what the layer computes, and compute it again going backward
        self.clear_conditioned()

    def condition_vis_x(self, vis_x: Tensor | None) -> None:
        """The bank of latents (N, n, d); None for a model that must do without pictures."""
        self.vis_x, self.keys_values, self.is_conditioned = vis_x, None, True

    def condition_media_locations(self, sight: Sight | None) -> None:
        """Who sees what, derived from the places of the <image> tokens."""
        self.sight = sight

    def condition_use_cached_media(self, use_cached_media: bool) -> None:
        """Keep the pictures' keys and values from one call to the next: for the steps of generating a text."""
        self.use_cached_media = use_cached_media

    def clear_conditioned(self) -> None:
        self.vis_x = self.sight = self.keys_values = None
        self.use_cached_media = self.is_conditioned = False

    def _media_keys_values(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values (N, h, n, c) of every picture of the bank, projected once."""
        if self.vis_x is None:
            return None
        keys_values = self.keys_values or self.gated_cross_attn_layer.attn.project_media(self.vis_x)
        if self.use_cached_media:
            self.keys_values = keys_values
        return keys_values

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        """hidden_states (B, T_txt, D); all else, and what comes back, is the decoder layer's own business."""
        if not self.is_conditioned:
            return self.decoder_layer(hidden_states, *args, **kwargs)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # By the time the backward pass comes here again the conditioning is gone: it is handed over, not looked up.
            seen = (self._media_keys_values(), self.sight)
            return checkpoint(self._look_then_read, hidden_states, *seen, *args, use_reentrant=False, **kwargs)
        return self._look_then_read(hidden_states, self._media_keys_values(), self.sight, *args, **kwargs)

    def _look_then_read(self, hidden_states: Tensor, keys_values, sight: Sight | None, *args, **kwargs):
        hidden_states = self.gated_cross_attn_layer(hidden_states, keys_values, sight)
        return self.decoder_layer(hidden_states, *args, **kwargs)

    def __getattr__(self, name: str):
        """Some models ask their layers for attributes (attention_type): answer with the wrapped layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("decoder_layer"), name)


class FlamingoLMMixin:
    """What a causal language model can do once extended. Call `init_flamingo` first."""

    def init_flamingo(
        self,
        *,
        media_token_id: int,
        added_token_ids: list[int],
        dim_visual: int,
        xattn_layers: list[int],
        only_attend_immediate_media: bool = True,
        decoder_layers_attr_name: str | None = None,
        **xattn_options,
    ) -> None:
        """Freeze the model, wrap its layers, decouple the added tokens.

        Args:
            media_token_id: id of <image>.
            added_token_ids: the consecutive ids of the added tokens, <image> among them.
            dim_visual: d of the latents.
            xattn_layers: which layers get a cross-attention (see `layers_with_cross_attention`).
            only_attend_immediate_media: see `who_sees_what`.
            decoder_layers_attr_name: where the layers are, if it cannot be found.
            **xattn_options: dim_head, heads, ff_mult and act of `GatedCrossAttentionBlock`.
        """
        self.requires_grad_(False)
        self.media_token_id = media_token_id
        self.only_attend_immediate_media = only_attend_immediate_media
        self._latents: Tensor | None = None
        self._image_index: Tensor | None = None
        self._media_locations: Tensor | None = None
        self._images_read: Tensor | None = None
        self._is_generating, self._tokens_read = False, 0

        _, layers = find_decoder_layers(self, decoder_layers_attr_name)
        dim = self.get_input_embeddings().embedding_dim if not hasattr(self.config, "hidden_size") else None
        dim = dim or self.config.hidden_size
        for i in xattn_layers:
            block = GatedCrossAttentionBlock(dim=dim, dim_visual=dim_visual, **xattn_options)
            layers[i] = FlamingoLayer(block, layers[i])
        self._flamingo_layers = tuple(layers[i] for i in xattn_layers)  # to look for them takes a millisecond a call

        first, count = min(added_token_ids), len(added_token_ids)
        self.set_input_embeddings(DecoupledEmbedding(self.get_input_embeddings(), first, count))
        self.set_output_embeddings(DecoupledLinear(self.get_output_embeddings(), first, count))
        # By this number transformers finds a token and its beam again among the scores of all beams.
        self.config.get_text_config().vocab_size = self.get_output_embeddings().out_features
        allow_packing(self)

    def _get_decoder_layers(self) -> list[FlamingoLayer]:
        """The layers that look at pictures, from the first to the last."""
        return list(self._flamingo_layers)

    @contextmanager
    def conditioned(
        self,
        latents: Tensor | None,
        image_index: Tensor | None,
        use_cached_media: bool = False,
        media_locations: Tensor | None = None,
    ) -> Iterator[None]:
        """Lay pictures beside the texts of the calls inside, and take them away however that ends.

        Args:
            latents: the bank (N, n, d); None: the texts have <image> tokens but nothing to see (a blind control).
            image_index: (B, T_img) pictures of each text as rows of the bank, -1 for an empty slot.
            use_cached_media: keep keys and values between calls (generation).
            media_locations: (B, T_txt) bool, where the pictures are announced in the whole text so far; at the <image>
                tokens of each call if not given.
        """
        try:
            self._latents, self._image_index, self._media_locations = latents, image_index, media_locations
            self._is_generating = use_cached_media
            for layer in self._get_decoder_layers():
                layer.condition_vis_x(latents)
                layer.condition_use_cached_media(use_cached_media)
            yield
        finally:
            self.clear_conditioned_layers()

    def clear_conditioned_layers(self) -> None:
        """Forget all pictures: the model is the plain language model again."""
        self._latents = self._image_index = self._media_locations = self._images_read = None
        self._is_generating, self._tokens_read = False, 0
        for layer in self._get_decoder_layers():
            layer.clear_conditioned()

    def train_own_weights(self, trains: bool) -> None:
        """Let the weights the model came with train, or freeze them; what was added trains in any case."""
        self.requires_grad_(trains)
        for module in self.modules():
            if isinstance(module, GatedCrossAttentionBlock):
                module.requires_grad_(True)
        self.get_input_embeddings().additional_embedding.requires_grad_(True)
        self.get_output_embeddings().additional_fc.requires_grad_(True)

    def positions_of(self, attention_mask: Tensor, last: int | None = None) -> dict[str, Tensor]:
        """{"position_ids": (B, T_txt)} for texts padded on the left, of the `last` tokens if said; empty for models
        that have no such argument. (`generate` does this by itself, and models that learn positions need it.)"""
        if not compat.takes_position_ids(self):
            return {}
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return {"position_ids": positions if last is None else positions[:, -last:]}

    def repeat_texts(self, times: int) -> None:
        """Inside `conditioned`, after the texts have been read: go on with `times` continuations of each."""
        if self._images_read is not None:
            self._images_read = self._images_read.repeat_interleave(times, dim=0)

    def loss(self, labels: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Mean loss of the labelled tokens. No work for padding (packing.py), no logits where there is no label, and
        not all of them at once (loss.py)."""
        targets = next_tokens(labels)  # (B, T_txt)
        asked = targets != -100
        packing = packing_of(attention_mask, self)
        head = self.get_output_embeddings()
        by_parts = self.config.model_type in DECODER_LAYERS  # others may do something to the logits after the head
        try:
            head.keep, head.is_skipped = asked if packing is None else packing.pack(asked), by_parts
            told = self(input_ids=input_ids, attention_mask=attention_mask, packing=packing, use_cache=False)
        finally:
            head.keep, head.is_skipped = None, False
        answers = told.logits  # hidden states (K, D), or logits (K, vocabulary)
        return loss_by_parts(head, answers, targets[asked]) if by_parts else mean_loss(answers, targets[asked])

    def forward(self, *args, packing: Packing | None = None, **kwargs):
        """The language model's own forward, after each layer has been told what the tokens of this call see.

        packing: lay the texts end to end for it, without their padding; what comes back lies so too.
        """
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0] if args else None
        cache = compat.find_cache((*args, *kwargs.values()))
        read = compat.tokens_read(cache)  # tokens of earlier calls
        self._check_length(input_ids, read)
        self._check_that_texts_grow(input_ids, cache)
        if self._latents is not None:
            sight = self._sight(input_ids, read)
            sight.packing = packing
            for layer in self._get_decoder_layers():
                layer.condition_media_locations(sight)
        if packing is not None:
            kwargs |= packing.inputs(input_ids)
        return super().forward(*args, **kwargs)

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest text; None for a model that sets no limit."""
        return compat.max_positions(self)

    def _check_length(self, input_ids: Tensor | None, read: int) -> None:
        if input_ids is None:
            return
        if input_ids.numel() == 0:
            raise ValueError(f"the batch is empty: input_ids have the shape {tuple(input_ids.shape)}")
        positions, length = self.max_positions, read + input_ids.shape[1]
        if positions is not None and length > positions:
            raise ValueError(
                f"a text of {length} tokens is longer than the {positions} positions of {self.config.model_type}: "
                "shorten it, or give fewer pictures with their captions"
            )

    def _check_that_texts_grow(self, input_ids: Tensor | None, cache) -> None:
        """While a text is generated each call reads all of it again, or comes with a cache of what was read before. One
        that does neither would take the next token for the beginning of a text, and every caption would be nonsense."""
        if input_ids is None or not self._is_generating:
            return
        if cache is None and input_ids.shape[1] <= self._tokens_read:
            raise compat.unlike("transformers", "goes on with a text without handing over the cache of its beginning")
        self._tokens_read = compat.tokens_read(cache) + input_ids.shape[1]

    def _sight(self, input_ids: Tensor | None, read: int) -> Sight:
        """Who sees what in this call: a text from its beginning, or the next tokens of one that has been read."""
        if input_ids is None:
            raise ValueError("a model that is shown pictures needs input_ids: inputs_embeds do not say where they are")
        tokens = input_ids.shape[1]
        beams = input_ids.shape[0] // self._image_index.shape[0]  # beams and samples of a text stand side by side
        image_index = self._image_index.repeat_interleave(beams, dim=0)
        told = self._media_locations
        if read and (told is None or told.shape[1] < read + tokens):
            if self._images_read is None:
                raise ValueError("to continue a text, say where its pictures are: media_locations of all of it")
            return sight_of_next_token(self._images_read, image_index, self.only_attend_immediate_media)
        if told is None:
            media_locations = input_ids == self.media_token_id
        else:  # what has been generated since has no pictures
            media_locations = F.pad(told.bool(), (0, max(0, read + tokens - told.shape[1])))
            media_locations = media_locations.repeat_interleave(beams, dim=0)
        self._images_read = media_locations.sum(dim=1)
        return who_sees_what(media_locations, image_index, self.only_attend_immediate_media).last(tokens)
