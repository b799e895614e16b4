"""The parts put together: pictures and text in, the probability of the next word out.

What this file teaches: a vision-language model is four steps, and Flamingo is one choice for each.

    encode     pixels → patch features       a frozen vision encoder               vision.py
    tokenize   features → a few latents      the Perceiver resampler (trained)     resampler.py
    fuse       latents beside the text       gated cross-attention (trained)       language_model.py
    predict    the next token                a frozen language model

*Encode once, index many.* Pictures are a bank: (N, …) of anything, and `image_index` (B, T_img) says which of them
stand in each text. So five captions of one picture, the beams of a search and the steps of a decode never encode,
resample or project the same picture twice. With no index, `pixel_values (B, T_img, F, C, H, W)` is the plain case.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo.interop import compat
from flamingo.language_model import FlamingoLMMixin, extend_instance, find_decoder_layers, layers_with_cross_attention
from flamingo.resampler import PerceiverResampler


@dataclass
class FlamingoOutput:
    """What `forward` returns.

    logits: (B, T_txt, vocabulary) without labels. With them there is the loss alone: see loss.py.
    loss: mean over the labelled tokens (0 if there are none).
    """

    logits: Tensor | None = None
    loss: Tensor | None = None


class VisionLanguageModel(nn.Module):
    """Encode, tokenize, fuse, predict. A subclass says how the latents are fused with the text.

    Args:
        vision_encoder: frozen, (N, C, H, W) → (N, v, d).
        vision_tokenizer: any module (N, F, v, d) → (N, n, d).
        lang_encoder: a Hugging Face causal language model.
        media_token_id, eoc_token_id, pad_token_id: ids of <image>, <|endofchunk|> and padding.
    """

    def __init__(
        self,
        vision_encoder: nn.Module,
        vision_tokenizer: nn.Module,
        lang_encoder: nn.Module,
        *,
        media_token_id: int,
        eoc_token_id: int,
        pad_token_id: int,
    ):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.perceiver = vision_tokenizer
        self.lang_encoder = lang_encoder
        self.media_token_id, self.eoc_token_id, self.pad_token_id = media_token_id, eoc_token_id, pad_token_id

    # ---------------------------------------------------------------------------------------- what trains
    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """Frozen parts stay in eval mode: a frozen model with dropout would not be the same model from step to step.
        (What trains has no dropout, so nothing is lost by keeping all of the language model there.)"""
        super().train(mode)
        self.vision_encoder.eval()
        self.lang_encoder.eval()
        return self

    def train_language_model(self, trains: bool) -> None:
        """Train the language model's own weights too, or freeze them (the default)."""
        self.lang_encoder.train_own_weights(trains)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Name → tensor of everything that trains, and nothing else."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    @property
    def latents_shape(self) -> tuple[int, int]:
        """(n, d) of a picture's latents."""
        return tuple(self.perceiver.latents.shape)

    # ------------------------------------------------------------------------------------ encode, tokenize
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(N, F, C, H, W) → (N, F, v, d), in the encoder's own dtype. No gradient: the encoder is frozen.

        Nor autocast, which keeps float32 weights for an optimizer and converts them at every call. Whoever wants
        bfloat16 converts the encoder once (`flamingo.training.hold_frozen_in_bf16`). On a CPU that is not merely
        faster: the attention of open_clip's towers is thirty times *slower* under autocast than in float32.
        """
        frames = rearrange(pixel_values, "N F C H W -> (N F) C H W")
        with torch.autocast(frames.device.type, enabled=False):
            features = self.vision_encoder(frames.to(next(self.vision_encoder.parameters()).dtype))
        return rearrange(features, "(N F) v d -> N F v d", N=len(pixel_values))

    def tokenize_images(self, features: Tensor, image_index: Tensor | None = None) -> Tensor:
        """(N, F, v, d) → (N, n, d)."""
        return self.perceiver(features)

    def prepare_images(
        self,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        latents: Tensor | None = None,
        image_index: Tensor | None = None,
        blind: bool = False,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Whatever form the pictures come in → the bank of latents (N, n, d) and image_index (B, T_img).

        Give exactly one of pixel_values (…, F, C, H, W), features (…, F, v, d) and latents (…, n, d), where … is N
        with an image_index and B, T_img without. blind: take the pictures away, a control; none need be given then, and
        both results are None.

        Raises:
            ValueError: none or several are given, the number of dimensions is wrong, or the index points beyond
                the bank.
        """
        if blind:
            return None, None
        given = {"pixel_values": pixel_values, "features": features, "latents": latents}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of pixel_values, features and latents, not {list(given) or 'none'}")
        ((name, bank),) = given.items()
        bank_dims = {"pixel_values": 5, "features": 4, "latents": 3}[name]
        if bank.ndim != bank_dims + (image_index is None):
            shapes = {"pixel_values": "F, C, H, W", "features": "F, v, d", "latents": "n, d"}[name]
            lead = "(N, " if image_index is not None else "(B, T_img, "
            raise ValueError(f"{name} must be {lead}{shapes}), not of shape {tuple(bank.shape)}")
        if image_index is None:  # the plain case: every text brings its own pictures
            texts, slots = bank.shape[:2]
            image_index = torch.arange(texts * slots, device=bank.device).view(texts, slots)
            bank = bank.flatten(0, 1)
        elif image_index.numel() and int(image_index.max()) >= len(bank):
            raise ValueError(f"image_index points at picture {int(image_index.max())} of a bank of {len(bank)}")
        if name == "pixel_values":
            name, bank = "features", self.encode_images(bank)
        if name == "features":
            dtype = next(self.perceiver.parameters()).dtype  # a feature cache holds float16
            bank = self.tokenize_images(bank.to(dtype), image_index)
        return bank, image_index

    def fuse(
        self,
        latents: Tensor | None,
        image_index: Tensor | None,
        generating: bool = False,
        media_locations: Tensor | None = None,
    ) -> AbstractContextManager:
        """Inside, the language model sees the pictures. Without latents it has <image> tokens but nothing to see.

        media_locations: (B, T_txt) where the pictures are announced, if not at the <image> tokens.
        """
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------- predict
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        latents: Tensor | None = None,
        image_index: Tensor | None = None,
        blind: bool = False,
    ) -> FlamingoOutput:
        """Logits of the next token at each position, or the loss if there are labels.

        Args:
            input_ids, attention_mask, labels: (B, T_txt); labels are -100 where there is no loss.
            pixel_values, features, latents, image_index, blind: see `prepare_images`.
        """
        latents, image_index = self.prepare_images(pixel_values, features, latents, image_index, blind)
        with self.fuse(latents, image_index):
            if labels is None:
                whole = self.lang_encoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
                return FlamingoOutput(logits=whole.logits)
            return FlamingoOutput(loss=self.lang_encoder.loss(labels, input_ids, attention_mask))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        latents: Tensor | None = None,
        image_index: Tensor | None = None,
        blind: bool = False,
        media_locations: Tensor | None = None,
        **generation_options,
    ) -> Tensor:
        """Continue texts: (B, T_txt) → (B, longer), the prompt included. Prompts are padded on the left.

        generation_options: those of transformers' `generate` (max_new_tokens, num_beams, do_sample, …). A text ends
        at <|endofchunk|>; <image> and padding are never generated.

        Raises ValueError before the first step if prompt and new tokens need more positions than there are.
        """
        latents, image_index = self.prepare_images(pixel_values, features, latents, image_index, blind)
        options = {
            "eos_token_id": self.eoc_token_id,
            "pad_token_id": self.pad_token_id,
            "suppress_tokens": sorted({self.media_token_id, self.pad_token_id}),
        } | generation_options
        if "generation_config" not in options:  # which says for itself how to choose and how long to go on
            options.setdefault("do_sample", False)
            if "max_length" not in options:
                options.setdefault("max_new_tokens", 32)
        self._check_room(input_ids.shape[1] + options.get("max_new_tokens", 0))
        with self.fuse(latents, image_index, generating=True, media_locations=media_locations):
            return self.lang_encoder.generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    def _check_room(self, length: int) -> None:
        positions = self.lang_encoder.max_positions
        if positions is not None and length > positions:
            raise ValueError(
                f"prompt and new tokens need {length} positions, the language model has {positions}: shorten the "
                "prompt, give fewer examples, or lower max_new_tokens"
            )

    @torch.no_grad()
    def score_sequences(
        self,
        input_ids: Tensor,
        candidates: Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        latents: Tensor | None = None,
        image_index: Tensor | None = None,
        media_locations: Tensor | None = None,
        blind: bool = False,
        mean: bool = False,
    ) -> Tensor:
        """Log-likelihood of each candidate as the continuation of each text: (B, K) in nats.

        The texts, padded on the left, are read once and serve all candidates. (flamingo-mini has such a method; the
        use for classification is OpenFlamingo's.)

        Args:
            input_ids, attention_mask: (B, T_txt) prompts. candidates: K lists of token ids, the same for each text.
            blind: see `prepare_images`.
            mean: per token instead of the sum, so that long candidates are not at a disadvantage.
        """
        latents, image_index = self.prepare_images(pixel_values, features, latents, image_index, blind)
        texts, count = len(input_ids), len(candidates)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        length = max(map(len, candidates))
        self._check_room(input_ids.shape[1] + length)
        ids = torch.full((count, length), self.pad_token_id, device=input_ids.device)
        real = torch.zeros(count, length, dtype=attention_mask.dtype, device=input_ids.device)
        for k, candidate in enumerate(candidates):
            ids[k, : len(candidate)] = torch.as_tensor(candidate, device=ids.device)
            real[k, : len(candidate)] = 1
        ids, real = ids.repeat(texts, 1), real.repeat(texts, 1)  # (B·K, L): all candidates of a text side by side
        with self.fuse(latents, image_index, generating=True, media_locations=media_locations):
            options = self.lang_encoder.positions_of(attention_mask)
            read = self.lang_encoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **options)
            cache = compat.cache_of(read)
            cache.batch_repeat_interleave(count)
            self.lang_encoder.repeat_texts(count)
            whole_mask = torch.cat([attention_mask.repeat_interleave(count, dim=0), real], dim=1)
            options = self.lang_encoder.positions_of(whole_mask, last=length)
            continued = self.lang_encoder(
                input_ids=ids, attention_mask=whole_mask, **compat.cache_argument(self.lang_encoder, cache), **options
            ).logits
        before = read.logits[:, -1:].repeat_interleave(count, dim=0)
        logits = torch.cat([before, continued[:, :-1]], dim=1).float()  # (B·K, L, vocabulary): what comes next
        chosen = -F.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * real
        total = chosen.sum(dim=1) / (real.sum(dim=1) if mean else 1)
        return rearrange(total, "(B K) -> B K", K=count)


class Flamingo(VisionLanguageModel):
    """Perceiver resampler and gated cross-attention between a frozen encoder and a frozen language model.

    Args:
        vision_encoder, lang_encoder, media_token_id, eoc_token_id, pad_token_id: see `VisionLanguageModel`;
            the language model is extended in place.
        dim_visual: d, width of the encoder's features.
        xattn_every, xattn_placement: see `layers_with_cross_attention`.
        xattn_dim_head, xattn_heads, xattn_ff_mult, xattn_act, xattn_init_gain: the cross-attention blocks.
        resampler_…: the resampler; num_time_embeds is its max_num_frames, 0 for none.
        only_attend_immediate_media: see `who_sees_what`.
        decoder_layers_attr_name: where the language model's layers are, if it cannot be found.
    """

    def __init__(
        self,
        vision_encoder: nn.Module,
        lang_encoder: nn.Module,
        *,
        media_token_id: int,
        eoc_token_id: int,
        pad_token_id: int,
        dim_visual: int,
        xattn_every: int = 1,
        xattn_placement: str = "near",
        xattn_dim_head: int = 64,
        xattn_heads: int = 8,
        xattn_ff_mult: int = 4,
        xattn_act: str = "gelu",
        xattn_init_gain: float = 1.0,
        resampler_depth: int = 6,
        resampler_dim_head: int = 64,
        resampler_heads: int = 8,
        resampler_num_latents: int = 64,
        resampler_num_time_embeds: int = 0,
        resampler_ff_mult: int = 4,
        resampler_act: str = "gelu",
        resampler_init_gain: float = 1.0,
        resampler_query_gain: float = 1.0,
        resampler_latents_std: float = 1.0,
        resampler_max_num_media: int = 0,
        only_attend_immediate_media: bool = True,
        decoder_layers_attr_name: str | None = None,
    ):
        perceiver = PerceiverResampler(
            dim=dim_visual, depth=resampler_depth, dim_head=resampler_dim_head, heads=resampler_heads,
            num_latents=resampler_num_latents, max_num_frames=resampler_num_time_embeds or None,
            max_num_media=resampler_max_num_media or None, ff_mult=resampler_ff_mult, act=resampler_act,
            init_gain=resampler_init_gain, query_gain=resampler_query_gain, latents_std=resampler_latents_std,
        )  # fmt: skip
        ids = {"media_token_id": media_token_id, "eoc_token_id": eoc_token_id, "pad_token_id": pad_token_id}
        super().__init__(vision_encoder.requires_grad_(False), perceiver, lang_encoder, **ids)
        _, layers = find_decoder_layers(lang_encoder, decoder_layers_attr_name)
        extend_instance(lang_encoder, FlamingoLMMixin)
        lang_encoder.init_flamingo(
            media_token_id=media_token_id,
            added_token_ids=sorted((media_token_id, eoc_token_id)),
            dim_visual=dim_visual,
            xattn_layers=layers_with_cross_attention(len(layers), xattn_every, xattn_placement),
            only_attend_immediate_media=only_attend_immediate_media,
            decoder_layers_attr_name=decoder_layers_attr_name,
            dim_head=xattn_dim_head, heads=xattn_heads, ff_mult=xattn_ff_mult, act=xattn_act,
            init_gain=xattn_init_gain,
        )  # fmt: skip
        self.train(False)

    def tokenize_images(self, features: Tensor, image_index: Tensor | None = None) -> Tensor:
        """(N, F, v, d) → (N, n, d)."""
        if self.perceiver.media_time_embs is None or image_index is None:
            return self.perceiver(features)
        return self.perceiver(features, _place_of_each_picture(image_index, len(features)))

    def fuse(
        self,
        latents: Tensor | None,
        image_index: Tensor | None,
        generating: bool = False,
        media_locations: Tensor | None = None,
    ) -> AbstractContextManager:
        """Cross-attention: the latents are laid beside the text."""
        return self.lang_encoder.conditioned(latents, image_index, generating, media_locations)

    def gates(self) -> list[tuple[float, float]]:
        """tanh of the attention and feed-forward gate of each layer, first layer first: how open it is."""
        blocks = [layer.gated_cross_attn_layer for layer in self.lang_encoder._get_decoder_layers()]
        return [(block.attn_gate.tanh().item(), block.ff_gate.tanh().item()) for block in blocks]


def _place_of_each_picture(image_index: Tensor, pictures: int) -> Tensor:
    """(B, T_img) → (N,) the slot each picture of the bank stands in.

    Raises ValueError if a picture stands in different slots: its latents would then differ from text to text.
    """
    slots = torch.arange(image_index.shape[1], device=image_index.device).expand_as(image_index)
    used = image_index >= 0
    place = torch.zeros(pictures, dtype=torch.long, device=image_index.device)
    place[image_index[used]] = slots[used]
    if (place[image_index[used]] != slots[used]).any():
        raise ValueError("with media time embeddings a picture of the bank must stand in the same place in every text")
    return place
