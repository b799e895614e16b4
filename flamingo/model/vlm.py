"""The parts put together: pictures and text in, the probability of the next token out. Start reading here.

What this file teaches: a vision-language model is four steps, and Flamingo is one choice for each.

    encode     pixels → patch features       a frozen vision encoder               vision.py
    tokenize   features → a few latents      the Perceiver resampler (trained)     resampler.py
    fuse       latents beside the text       gated cross-attention (trained)       cross_attention.py, language_model.py
    predict    the next token                a frozen language model, with         added_tokens.py

Letters, everywhere: B texts of T_txt tokens, D wide, with T_img picture slots each; a *bank* of N different pictures, F
frames each, v patches a frame, d wide, n latents a picture. Texts point into the bank by row.

Read the five files in this order: vlm, resampler, cross_attention, language_model, added_tokens. They are Flamingo as
the paper has it, and run alone (`python train.py --plain`). flamingo/fast gives the same numbers sooner, from outside.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo.config import ModelConfig
from flamingo.interop import compat
from flamingo.model.added_tokens import decouple_added_tokens
from flamingo.model.cross_attention import Images
from flamingo.model.generation import TextGeneration, with_open_flamingo_names
from flamingo.model.language_model import CrossAttentionFusion, FlamingoLMMixin, extend_instance


class SpecialTokens(NamedTuple):
    """Ids of <image>, <|endofchunk|> and padding."""

    image: int
    eoc: int
    pad: int


@dataclass
class Text:
    """What the language model is called with. Fusion is given one and hands on one, the same or another.

    input_ids, attention_mask, labels, media_locations: (B, T_txt); inputs_embeds: (B, T_txt, D) in place of the ids.
    labels are -100 where there is no loss; media_locations say where the pictures are, if not at the <image> tokens.
    position_ids, places: if pictures stand in between (language_stream.py), and (B, T_txt) where to read what follows.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    labels: Tensor | None = None
    media_locations: Tensor | None = None
    inputs_embeds: Tensor | None = None
    position_ids: Tensor | None = None
    places: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of the language model."""
        names = ("input_ids" if self.inputs_embeds is None else "inputs_embeds", "attention_mask", "position_ids")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def at_tokens(self, x: Tensor) -> Tensor:
        """Of all that was read (B, …, D) → of the text's tokens (B, T_txt, D)."""
        return x if self.places is None else x.gather(1, self.places[..., None].expand(-1, -1, x.shape[-1]))


def next_tokens(labels: Tensor) -> Tensor:
    """Labels (B, T_txt) → what the next token should be at each position, -100 where there is no loss."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (B, T_txt, vocabulary), labels (B, T_txt) → mean loss of the labelled tokens; 0 if there are none."""
    targets = next_tokens(labels)
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


class VisionLanguageModel(TextGeneration, nn.Module):
    """Encode, tokenize, fuse, predict. A subclass chooses the parts.

    Args:
        vision_encoder: frozen, (N, C, H, W) → (N, v, d).
        vision_tokenizer: any module (N, F, v, d) → (N, n, d') with parameters, and the attributes
            `num_latents` (n) and `dim` (d').
        lang_encoder: a Hugging Face causal language model.
        fusion: `fusion(images, text, generating)` is a context in which the language model sees the images, and gives
            the Text to call it with.
        tokens: ids of the special tokens.
    """

    def __init__(
        self, vision_encoder: nn.Module, vision_tokenizer: nn.Module, lang_encoder: nn.Module, fusion,
        tokens: SpecialTokens,
    ):  # fmt: skip
        super().__init__()
        self.vision_encoder = vision_encoder.requires_grad_(False)
        self.perceiver = vision_tokenizer  # OpenFlamingo's name for it, in every checkpoint
        self.lang_encoder, self.fusion = lang_encoder, fusion
        self.media_token_id, self.eoc_token_id, self.pad_token_id = tokens
        self.train_language_model(False)

    vision_tokenizer = resampler = property(lambda self: self.perceiver)  # ours and flamingo-mini's name

    # ---------------------------------------------------------------------------------------- what trains
    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """Frozen parts stay in eval mode: a frozen model with dropout would not be the same model from step to step.
        (So do the blocks inside the language model, which have no dropout; an adapter's own dropout does act.)"""
        super().train(mode)
        self.vision_encoder.eval()
        compat.set_training(self.lang_encoder, mode, self.trains_language_model)
        return self

    def added_parts(self) -> list[nn.Module]:
        """What was added to the language model, and trains in any case."""
        tables = self.lang_encoder.get_input_embeddings(), self.lang_encoder.get_output_embeddings()
        return [tables[0].additional_embedding, tables[1].additional_fc, *self.cross_attention_blocks()]

    def cross_attention_blocks(self) -> list[nn.Module]:
        """Those between the decoder layers, first to last; none where pictures stand in the text itself."""
        return [layer.gated_cross_attn_layer for layer in getattr(self.lang_encoder, "_get_decoder_layers", list)()]

    def gates(self) -> list[tuple[float, float]]:
        """tanh of the attention and feed-forward gate of each block: how open it is."""
        return [(block.attn_gate.tanh().item(), block.ff_gate.tanh().item()) for block in self.cross_attention_blocks()]

    def train_language_model(self, trains: bool) -> None:
        """Train the language model's own weights too, or freeze them (the default)."""
        self.trains_language_model = trains
        self.lang_encoder.requires_grad_(trains)
        for part in self.added_parts():
            part.requires_grad_(True)
        self.train(self.training)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Name → tensor of everything that trains, and nothing else."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    # ------------------------------------------------------------------------------------ encode, tokenize
    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(N, F, C, H, W) → (N, F, v, d). No gradient and no autocast: a frozen encoder keeps its own dtype."""
        frames = rearrange(pixel_values, "N F C H W -> (N F) C H W")
        with torch.no_grad(), torch.autocast(frames.device.type, enabled=False):
            features = self.vision_encoder(frames.to(next(self.vision_encoder.parameters()).dtype))
        return rearrange(features, "(N F) v d -> N F v d", N=len(pixel_values))

    def tokenize_images(self, features: Tensor, image_index: Tensor | None = None) -> Tensor:
        """(N, F, v, d) → (N, n, d'). image_index: (B, T_img), for a tokenizer that needs a picture's place."""
        if image_index is None or getattr(self.vision_tokenizer, "media_time_embs", None) is None:
            return self.vision_tokenizer(features)
        return self.vision_tokenizer(features, self._place_of_each_picture(image_index, len(features)))

    def _place_of_each_picture(self, image_index: Tensor, pictures: int) -> Tensor:
        """(B, T_img) → (N,) the slot each picture of the bank stands in. Raises ValueError if a text has more pictures
        than there are embeddings, or a picture different slots: its latents would differ from text to text."""
        known = len(self.vision_tokenizer.media_time_embs)
        if image_index.shape[1] > known:
            raise ValueError(f"a text has {image_index.shape[1]} pictures, but max_num_media is {known}")
        slots = torch.arange(image_index.shape[1], device=image_index.device).expand_as(image_index)
        row = torch.where(image_index < 0, pictures, image_index)  # empty slots write into a row that is dropped
        place = torch.zeros(pictures + 1, dtype=torch.long, device=row.device)
        place.scatter_(0, row.flatten(), slots.flatten())
        mistake = "with media time embeddings a picture of the bank must stand in the same place in every text"
        compat.check_values((place[row] == slots) | (image_index < 0), lambda i: mistake)
        return place[:-1]

    def prepare_images(
        self, pixel_values: Tensor | None = None, features: Tensor | None = None, latents: Tensor | None = None,
        image_index: Tensor | None = None, texts_per_image: int | None = None, blind: bool = False,
    ) -> Images | None:  # fmt: skip
        """Whatever form the pictures come in → the bank of latents and who points at it; None if blind.

        Args:
            pixel_values (…, F, C, H, W), features (…, F, v, d), latents (…, n, d): one of them. … is B, T_img
                in the plain case (every text brings its own pictures), and N, a bank, with one of the next two.
            image_index: (B, T_img) rows of the bank in the order of the text; -1 for an empty slot, and these last.
            texts_per_image: in place of an index, K texts to each picture, in the bank's order.
            blind: take the pictures away, a control; none need be given then.

        Raises:
            ValueError: none or several are given, their dimensions are wrong, or the index points beyond the bank.
        """
        if blind:
            return None
        given = {"pixel_values": pixel_values, "features": features, "latents": latents}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of pixel_values, features and latents, not {list(given) or 'none'}")
        ((name, bank),) = given.items()
        dims = {"pixel_values": "F, C, H, W", "features": "F, v, d", "latents": "n, d"}[name]
        plain = image_index is None and texts_per_image is None
        lead = "B, T_img" if plain else "N"
        if bank.ndim != len(f"{lead}, {dims}".split(",")):
            raise ValueError(f"{name} must be ({lead}, {dims}), not of shape {tuple(bank.shape)}")
        if plain:
            texts, slots = bank.shape[:2]
            bank = bank.flatten(0, 1)
            image_index = torch.arange(texts * slots, device=bank.device).view(texts, slots)
            texts_per_image = 1 if slots == 1 else None
        elif image_index is None:
            image_index = torch.arange(len(bank), device=bank.device).repeat_interleave(texts_per_image)[:, None]
        else:
            beyond = lambda i: f"image_index points at picture {int(image_index[i].max())} of {len(given[name])}"  # noqa: E731
            compat.check_values(image_index < len(bank), beyond)
            in_order = (image_index[:, :-1] >= 0) | (image_index[:, 1:] < 0)
            compat.check_values(in_order, lambda i: f"image_index of text {i} has an empty slot before a picture")
            texts_per_image = None  # the index is what counts
        if name == "pixel_values":
            bank = self.encode_images(bank)
        if name != "latents":
            dtype = next(self.vision_tokenizer.parameters()).dtype  # a feature cache holds float16
            bank = self.tokenize_images(bank.to(dtype), image_index)
        return Images(bank, image_index, texts_per_image)

    # --------------------------------------------------------------------------------------- fuse, predict
    @with_open_flamingo_names
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
        media_locations: Tensor | None = None, inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None, features: Tensor | None = None, latents: Tensor | None = None,
        image_index: Tensor | None = None, texts_per_image: int | None = None, blind: bool = False, **lm_options,
    ):  # fmt: skip
        """The language model's own output: `.logits` (B, T_txt, vocabulary), and `.loss` if there are labels.

        Args: see `Text` and `prepare_images`. lm_options: the language model's (use_cache, output_hidden_states, …).
        """
        images = self.prepare_images(pixel_values, features, latents, image_index, texts_per_image, blind)
        with self.reading(images, input_ids, attention_mask, media_locations, labels, inputs_embeds) as text:
            return self.predict(text, **({"use_cache": False} | lm_options))

    @contextmanager
    def reading(
        self, images: Images | None, input_ids, attention_mask=None, media_locations=None, labels=None,
        inputs_embeds=None, generating: bool = False,
    ) -> Iterator[Text]:  # fmt: skip
        """Inside, the language model sees the images; gives the Text to call it with."""
        text = Text(input_ids, attention_mask, labels, media_locations, inputs_embeds)
        with self.fusion(images, text, generating) as text:
            yield text

    def predict(self, text: Text, **lm_options):
        output = self.lang_encoder(**text.inputs(), **lm_options)
        output["logits"] = text.at_tokens(output.logits)
        if text.labels is not None:
            output.loss = next_token_loss(output.logits, text.labels)
        return output


class Flamingo(VisionLanguageModel):
    """A vision tokenizer and gated cross-attention between a frozen encoder and a frozen language model.

    Args: see `VisionLanguageModel`; the language model is extended in place. config: of which the fusion and the place
    of the decoder layers are read.
    """

    def __init__(self, vision_encoder, vision_tokenizer, lang_encoder, tokens: SpecialTokens, config: ModelConfig):
        extend_instance(lang_encoder, FlamingoLMMixin)
        lang_encoder.init_flamingo(
            media_token_id=tokens.image, dim_visual=vision_tokenizer.dim, config=config.fusion,
            decoder_layers_attr_name=config.language.decoder_layers,
        )  # fmt: skip
        decouple_added_tokens(lang_encoder, sorted((tokens.image, tokens.eoc)))
        fusion = CrossAttentionFusion(lang_encoder)
        super().__init__(vision_encoder, vision_tokenizer, lang_encoder, fusion, tokens)
        self.train(False)
