"""Extending a live language model: chosen decoder layers look at pictures before they do their own work.

What this file teaches: how Flamingo gets into a Hugging Face model without changing a line of its source.

    lm = AutoModelForCausalLM.from_pretrained("facebook/opt-125m", dtype=torch.float32)
    extend_instance(lm, FlamingoLMMixin)          # the same object, of a new class with new abilities
    lm.init_flamingo(...)                         # a chosen layer becomes FlamingoLayer(cross-attention, layer)

    with lm.conditioned(images):                  # the pictures are laid beside the text, and taken away afterwards
        lm(input_ids=...)

Outside `conditioned` no cross-attention acts: a frozen language model is then the one it was, whatever has been trained
beside it. (The mixin and the names of its methods follow open_flamingo.)
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from flamingo.config import CrossAttentionConfig, layers_with_cross_attention
from flamingo.interop import compat
from flamingo.interop.threads import one_at_a_time
from flamingo.model.cross_attention import (
    GatedCrossAttentionBlock,
    Images,
    MediaMask,
    mask_of_next_tokens,
    media_attention_mask,
)


def extend_instance(obj: nn.Module, mixin: type) -> None:
    """Give a live object the abilities of `mixin`: its class becomes a new one, made of the mixin and its old class."""
    base = type(obj)
    made_of = (*getattr(base, "made_of", (base,)), mixin)  # the original class and its mixins, the first one first
    body = {"__module__": mixin.__module__, "__doc__": base.__doc__, "made_of": made_of}
    body["__reduce_ex__"] = lambda self, protocol: (_made_again, made_of, self.__getstate__())
    if "forward" in vars(mixin):

        @functools.wraps(base.forward)  # transformers reads forward's signature to learn what generate() may pass
        def forward(self, *args, **kwargs):
            return mixin.forward(self, *args, **kwargs)

        body["forward"] = forward
    name = mixin.__name__.removesuffix("Mixin").removesuffix("LM")
    obj.__class__ = type(f"{name}{base.__name__}", (mixin, base), body)


def _made_again(original: type, *mixins: type) -> nn.Module:
    """For pickle and copy, which look for a class by its name and would not find the new one."""
    obj = original.__new__(original)
    for mixin in mixins:
        extend_instance(obj, mixin)
    return obj


class FlamingoLayer(nn.Module):
    """A gated cross-attention, then the decoder layer that was there before.

    It holds what it was conditioned on: the pictures (`vis_x`), who sees which (`media_mask`), and, while text is
    generated, their keys and values. Without conditioning it is the decoder layer alone.
    """

    def __init__(self, gated_cross_attn_layer: GatedCrossAttentionBlock, decoder_layer: nn.Module):
        super().__init__()
        self.gated_cross_attn_layer = gated_cross_attn_layer
        self.decoder_layer = decoder_layer
        self.clear_conditioned()

    def condition_vis_x(self, vis_x: Tensor | None) -> None:
        """The bank of latents (N, n, d); None for a model that must do without pictures."""
        self.vis_x, self.keys_values, self.is_conditioned = vis_x, None, True

    def condition_media_locations(self, media_mask: MediaMask | None) -> None:
        """Who sees what, derived from the places of the <image> tokens."""
        self.media_mask = media_mask

    def condition_use_cached_media(self, use_cached_media: bool) -> None:
        """Keep the pictures' keys and values from one call to the next: for the steps of generating a text."""
        self.use_cached_media = use_cached_media

    def clear_conditioned(self) -> None:
        self.vis_x = self.media_mask = self.keys_values = None
        self.use_cached_media = self.is_conditioned = False

    def media_keys_values(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values (N, h, n, c) of every picture of the bank, projected once."""
        if self.vis_x is None:
            return None
        keys_values = self.keys_values or self.gated_cross_attn_layer.attn.project_media(self.vis_x)
        self.keys_values = keys_values if self.use_cached_media else None
        return keys_values

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        """hidden_states (B, T_txt, D); all else, and what comes back, is the decoder layer's own business."""
        if not self.is_conditioned:
            return self.decoder_layer(hidden_states, *args, **kwargs)
        return self.cross_attend_then_decode(hidden_states, self.media_keys_values(), self.media_mask, *args, **kwargs)

    def cross_attend_then_decode(self, hidden_states, keys_values, media_mask, *args, **kwargs):
        hidden_states = self.gated_cross_attn_layer(hidden_states, keys_values, media_mask)
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
        self, *, media_token_id: int, dim_visual: int, config: CrossAttentionConfig | None = None,
        decoder_layers_attr_name: str | None = None,
    ) -> None:  # fmt: skip
        """Freeze the model and wrap its layers.

        media_token_id: id of <image>. dim_visual: d of the latents. config: which layers get a cross-attention, and of
        what shape. decoder_layers_attr_name: where the layers are, if it cannot be found.
        """
        config = config or CrossAttentionConfig()
        self.requires_grad_(False)
        self.media_token_id, self.only_immediate_media = media_token_id, config.only_immediate_media
        self._init_layers(compat.find_decoder_layers(self, decoder_layers_attr_name)[1], dim_visual, config)

    def _init_layers(self, lm_layers: nn.ModuleList, dim_visual: int, config: CrossAttentionConfig) -> None:
        """Put a gated cross-attention before each chosen decoder layer, in the list itself."""
        chosen = layers_with_cross_attention(len(lm_layers), config.every, config.placement)
        shape = {"dim": self.config.hidden_size, "dim_visual": dim_visual, **config.block_settings()}
        for i in chosen:
            lm_layers[i] = FlamingoLayer(GatedCrossAttentionBlock(**shape), lm_layers[i])
        self._flamingo_layers = tuple(lm_layers[i] for i in chosen)  # to look for them takes a millisecond a call
        self.clear_conditioned_layers()

    def _get_decoder_layers(self) -> list[FlamingoLayer]:
        """The layers that look at pictures, from the first to the last."""
        return list(self._flamingo_layers)

    @contextmanager
    def conditioned(
        self, images: Images | None, media_locations: Tensor | None = None, *, generating: bool = False
    ) -> Iterator[None]:
        """Lay pictures beside the texts of the calls inside, and take them away however that ends.

        Args:
            images: the bank and who points at it; None: the texts have <image> tokens but nothing to see (blind).
            media_locations: (B, T_txt) bool, where the pictures are in the whole text so far. Without them they are at
                the <image> tokens of the first call, and tokens of later calls see what its last token saw.
            generating: the calls inside are steps of one text, so keys and values of the pictures are kept.
        """
        try:
            self._images, self._media_locations, self._is_generating = images, media_locations, generating
            for layer in self._get_decoder_layers():
                layer.condition_vis_x(None if images is None else images.latents)
                layer.condition_use_cached_media(generating)
            yield
        finally:
            self.clear_conditioned_layers()

    def clear_conditioned_layers(self) -> None:
        """Forget all pictures: the model is the plain language model again."""
        self._images = self._media_locations = self._images_read = None  # read: (B,) <image> tokens in earlier calls
        self._is_generating, self._tokens_read = False, 0  # of each text, in earlier calls of a generation
        for layer in self._get_decoder_layers():
            layer.clear_conditioned()

    def forward(self, *args, **kwargs):
        """The language model's own forward, once each layer knows what the tokens of this call see."""
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is not None:
            self.condition_on_text(tokens, compat.find_cache((*args, *kwargs.values())))
        return super().forward(*args, **kwargs)

    def condition_on_text(self, tokens: Tensor, cache=None) -> MediaMask | None:
        """Work out who sees what in a call, and tell every layer. None if there are no pictures.

        tokens: (B, T_txt) ids, or their embeddings (B, T_txt, D) if `conditioned` was given media_locations.
        cache: of the language model, if earlier tokens of the texts have been read.
        """
        read = compat.tokens_read(cache)
        compat.check_length(self, tokens, read)
        if self._is_generating:
            self._tokens_read = compat.check_that_text_grows(self._tokens_read, tokens, cache)
        media_mask = None if self._images is None else self._media_mask(tokens, read)
        for layer in self._get_decoder_layers():
            layer.condition_media_locations(media_mask)
        return media_mask

    def _media_mask(self, tokens: Tensor, read: int) -> MediaMask:
        """A text from its beginning, or the next tokens of one of which `read` were read."""
        images, length, end = self._images, tokens.shape[1], read + tokens.shape[1]
        beams, rest = divmod(len(tokens), len(images.image_index))  # beams and samples of a text stand side by side
        if rest or (beams != 1 and not self._is_generating):
            raise ValueError(f"{len(tokens)} texts, but pictures for {len(images.image_index)}")
        image_index = images.image_index.repeat_interleave(beams, dim=0)
        media_locations = self._media_locations
        if read and (media_locations is None or media_locations.shape[1] < end):
            if self._images_read is None:
                raise ValueError("to continue a text, say where its pictures are: media_locations of all of it")
            images_read = self._images_read.repeat_interleave(tokens.shape[0] // len(self._images_read), dim=0)
            media_mask = mask_of_next_tokens(images_read, image_index, self.only_immediate_media)
        else:
            if media_locations is None:
                if tokens.ndim != 2:
                    raise ValueError("inputs_embeds do not say where the pictures are: give media_locations as well")
                media_locations = tokens == self.media_token_id
            else:  # what has been generated since has no pictures
                media_locations = F.pad(media_locations.bool(), (0, max(0, end - media_locations.shape[1])))
                media_locations = media_locations.repeat_interleave(beams, dim=0)
            self._images_read = media_locations[:, :end].sum(dim=1)
            media_mask = media_attention_mask(media_locations, image_index, self.only_immediate_media)
            media_mask.sees_image = media_mask.sees_image[:, end - length : end]  # of the tokens of this call
            media_mask.mask = None if media_mask.mask is None else media_mask.mask[:, end - length : end]
        media_mask.texts_per_image = images.texts_per_image and images.texts_per_image * beams
        return media_mask


class CrossAttentionFusion:
    """Fusion by cross-attention: the text stays as it is, the latents are laid beside it."""

    def __init__(self, lm: FlamingoLMMixin):
        self.lm = lm

    @contextmanager
    def __call__(self, images: Images | None, text, generating: bool = False) -> Iterator:
        """Inside, the language model sees the pictures (its layers hold them: another thread has to wait)."""
        with one_at_a_time(self.lm), self.lm.conditioned(images, text.media_locations, generating=generating):
            yield text
