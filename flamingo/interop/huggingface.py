"""FlamingoModel: the same Flamingo behind the Hugging Face API.

What this file teaches: what a model needs in order to behave as users of transformers expect, and how little of it has
to touch the model. `FlamingoModel` holds a `Flamingo`, translates arguments (the names are flamingo-mini's), and lets
everything else through:

    model = FlamingoModel.from_pretrained("runs/classroom")         a run folder, or a repository on the hub
    processor = FlamingoProcessor.from_pretrained("runs/classroom")
    inputs = processor(images=[picture], text=["<image> a"])
    model.generate(**inputs, num_beams=3)                           every strategy transformers offers
    model.generate_captions(processor, images=[picture])            one caption for each picture

It is registered with AutoConfig, AutoModelForImageTextToText and AutoProcessor when this file is imported.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Cache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from flamingo.data.processor import FlamingoProcessor
from flamingo.errors import InputError
from flamingo.evaluation.attention import recorded_cross_attention
from flamingo.fast.checkpointing import checkpoint_layers
from flamingo.interop import compat
from flamingo.interop.backbones import Built, build_flamingo
from flamingo.interop.huggingface_adapters import Adapters
from flamingo.interop.huggingface_arguments import reduced_loss, refuse_unread
from flamingo.interop.huggingface_config import FlamingoConfig
from flamingo.interop.huggingface_generation import Generate
from flamingo.interop.huggingface_loading import LoadAndSave
from flamingo.interop.huggingface_stream import behind
from flamingo.model.cross_attention import Images
from flamingo.model.language_model import FlamingoLayer
from flamingo.model.language_stream import LanguageStreamModel
from flamingo.model.vlm import next_tokens
from flamingo.settings import to_flat


@dataclass
class TextSoFar:
    """What the tokens in a cache have seen, kept with the cache, for the next call may bring neither pictures nor
    <image>. media_locations: (B, tokens read) bool. attention_mask: of a language stream, whose pictures are in the
    cache themselves, (B, places read)."""

    images: Images | None
    media_locations: Tensor
    attention_mask: Tensor | None = None


class FlamingoModel(LoadAndSave, Generate, Adapters, PreTrainedModel, GenerationMixin):
    """A Flamingo with the methods of a Hugging Face model.

    `FlamingoModel(config)` loads the two frozen backbones by name and makes fresh trained parts;
    `FlamingoModel.from_pretrained(folder_or_hub_name)` also loads what was trained.

    Attributes: flamingo, the model itself; processor, the `FlamingoProcessor` that belongs to it.
    """

    config_class = FlamingoConfig
    base_model_prefix = "model"  # there is none: `flamingo` has no head of its own to do without
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # if the language model does
    _no_split_modules = ("FlamingoLayer", "PerceiverResampler")

    def __init__(self, config: FlamingoConfig | None, built: Built | None = None):
        """built: a model that is there already; of the config given only what is no architecture is then read."""
        wanted_dtype, attention = torch.get_default_dtype(), config and compat.requested_attention(config)
        if built is None:
            with compat.default_dtype(torch.float32):  # in which backbones are compared with their fingerprints
                built = build_flamingo(config.model_config())
        config = FlamingoConfig() if config is None else copy.deepcopy(config)
        for name, value in to_flat(built.config).items():
            setattr(config, name, value)
        config.pad_token_id, config.eos_token_id = built.model.pad_token_id, built.model.eoc_token_id
        config.architectures = ["FlamingoModel"]
        compat.note_attention(config, compat.attention_name(built.model.lang_encoder))
        super().__init__(config)
        self.flamingo, self.processor = built.model, built.processor
        self.generation_config = self.flamingo.lang_encoder.generation_config
        checkpoint_layers(self.flamingo, on=False)  # until `gradient_checkpointing_enable`
        self.take_checkpoints_by_either_name()
        self.post_init()
        self._decodes_rightly = False  # not checked yet
        if attention is not None:
            self.set_attn_implementation(attention)
        if wanted_dtype != torch.float32:
            self.to(wanted_dtype)

    def init_weights(self) -> None:
        """transformers calls this when a model is built: all weights have their values already."""
        of_lm = getattr(self.flamingo.lang_encoder, "all_tied_weights_keys", {})
        prefix = "flamingo.lang_encoder."
        self.all_tied_weights_keys = {f"{prefix}{one}": f"{prefix}{other}" for one, other in of_lm.items()}

    def set_attn_implementation(self, attn_implementation: str, **options) -> None:
        """The attention of the backbones (the vision encoder's only if it is transformers' own): sdpa, eager, …"""
        for part in (self.flamingo.lang_encoder, *self.flamingo.vision_encoder.children()):
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation(attn_implementation, **options)
        compat.note_attention(self.config, compat.attention_name(self.flamingo.lang_encoder))

    # --------------------------------------------------------------------------------------------- what trains
    def freeze_vm(self) -> None:
        """Freeze the vision encoder (it always is: nothing in this repository trains it)."""
        self.flamingo.vision_encoder.requires_grad_(False)

    def freeze_lm(self) -> None:
        """Freeze the language model; cross-attention and the two added tokens go on training."""
        self._set_lm(False)

    def unfreeze_lm(self) -> None:
        """Train the language model too. Its weights are then in the checkpoint."""
        self._set_lm(True)

    def _set_lm(self, trains: bool) -> None:
        self.flamingo.train_language_model(trains)
        self.config.freeze_language_model = not trains

    def train(self, mode: bool = True) -> "FlamingoModel":
        """Frozen parts stay in eval mode (model/vlm.py); what a user has put into them does not: the noise on the token
        embeddings that the Trainer's neftune_noise_alpha is."""
        super().train(mode)
        for module in self.modules():
            if hasattr(module, "neftune_noise_alpha"):
                module.train(mode)
        return self

    def parameters_trainable(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.flamingo.parameters() if parameter.requires_grad)

    def state_dict_trainable(self) -> dict[str, Tensor]:
        """Name → tensor of what trains, as in the checkpoint."""
        return self.flamingo.trainable_state_dict()

    def get_modified_layers(self) -> list[FlamingoLayer]:
        """The decoder layers that look at pictures, first to last; none in a language stream."""
        return [] if self._is_stream() else self.flamingo.lang_encoder._get_decoder_layers()

    def get_input_embeddings(self) -> nn.Module:
        return self.flamingo.lang_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.flamingo.lang_encoder.set_input_embeddings(value)

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.flamingo.lang_encoder.set_output_embeddings(value)

    def resize_token_embeddings(self, *_, **__) -> None:
        raise InputError("the vocabulary is that of the frozen language model: resize that, and name the new one")

    lm_head = property(lambda self: self.get_output_embeddings())  # flamingo-mini's name

    def get_output_embeddings(self) -> nn.Module:
        return self.flamingo.lang_encoder.get_output_embeddings()

    # ------------------------------------------------------------------------------------------------ pictures
    @torch.no_grad()
    def encode_resample_visuals(self, pixel_values: Tensor) -> Tensor:
        """Pixels → visual_features (B, T_img, n, d), which forward and generate take in place of pixels.

        pixel_values: (B, T_img, F, C, H, W); without F still pictures; (T_img, C, H, W) is one text with T_img
        pictures, as in flamingo-mini.
        """
        pixel_values = self._six_dimensional(pixel_values, texts=None)
        texts = len(pixel_values)
        bank = self.flamingo.encode_images(rearrange(pixel_values, "B T F C H W -> (B T) F C H W"))
        index = torch.arange(len(bank), device=bank.device).view(texts, -1)
        return rearrange(self.flamingo.tokenize_images(bank, index), "(B T) n d -> B T n d", B=texts)

    @staticmethod
    def _six_dimensional(pixel_values: Tensor, texts: int | None) -> Tensor:
        """→ (B, T_img, F, C, H, W). Four dimensions are all pictures of a single text, or one picture for each of
        several. texts: how many there are; None if pictures come without texts."""
        six = pixel_values
        if six.ndim == 4:
            six = rearrange(six, "T C H W -> 1 T C H W" if texts in (None, 1) else "B C H W -> B 1 C H W")
        if six.ndim == 5:
            six = rearrange(six, "B T C H W -> B T 1 C H W")
        if six.ndim != 6 or texts not in (None, len(six)):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} do not fit {texts or 'any'} texts: give "
                "(B, C, H, W), (B, T_img, C, H, W) or (B, T_img, F, C, H, W)"
            )
        return six

    def _images(
        self,
        texts: int,
        pixel_values: Tensor | None,
        visual_features: Tensor | None,
        image_index: Tensor | None,
    ) -> dict[str, Tensor]:
        """What a user gives → the arguments of `Flamingo`: pictures under its names and with all their dimensions.

        A text with fewer pictures than others is filled up behind its own; no <image> of it points there.
        """
        if pixel_values is not None and visual_features is not None:
            raise ValueError("give pixel_values or visual_features, not both")
        if image_index is None and pixel_values is not None:
            pixel_values = self._six_dimensional(pixel_values, texts)
        if image_index is None and visual_features is not None and len(visual_features) != texts:
            raise ValueError(f"pictures for {len(visual_features)} texts, but {texts} texts")
        if visual_features is not None:
            visual_features = visual_features.to(next(self.flamingo.vision_tokenizer.parameters()).dtype)
        images = {"pixel_values": pixel_values, "latents": visual_features, "image_index": image_index}
        return {name: value for name, value in images.items() if value is not None} or {"blind": True}

    # ------------------------------------------------------------------------------------- forward and generate
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        media_locations: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        image_index: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        loss_reduction: str = "mean",
        **lm_options,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, T_txt, vocabulary) of the next token, and the mean loss if there are labels.

        Args:
            input_ids, attention_mask, labels: (B, T_txt); labels are -100 where there is no loss.
            inputs_embeds: (B, T_txt, D) in place of input_ids, with media_locations.
            media_locations: (B, T_txt) bool; at the <image> tokens if not given. With a cache, of the whole
                text so far; if not given, where the pictures of earlier calls were.
            pixel_values: see `encode_resample_visuals`; visual_features: what it returns. Neither: no pictures, or with
                a cache those of earlier calls.
            image_index: (B, T_img); pixel_values or visual_features are then a bank (N, …), see `Flamingo`.
            cache, or past_key_values, its name before transformers 5.24: keys and values of the text so far. (In a
                language stream its pictures are in it: give those of the new tokens only.)
            output_attentions: `.attentions` of the language model, a (B, h, T_txt, T_txt) for each layer, and
                `.cross_attentions` (B, h, T_txt, T_img·n) for each layer that looks at pictures. (The language model
                is then computed by attn_implementation="eager", for no other keeps them.)
            return_dict: False gives a tuple, the loss first.
            num_items_in_batch: labelled tokens of all batches whose gradients are added up, by which the Trainer wants
                the loss to be divided.
            loss_reduction: mean, sum, or none: (B, T_txt - 1), of each token but the first, 0 where there is no label.
            use_cache, lm_options: the language model's own. shift_labels, (B, T_txt) in place of labels: the token that
                should follow each. (No name of its own above: the Trainer would take it for a label of every batch.)

        Raises TypeError for an argument that nothing reads.
        """
        lm, config = self.flamingo.lang_encoder, self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        shift_labels = lm_options.pop("shift_labels", None)
        if lm_options:
            refuse_unread(lm_options, compat.arguments_of(lm), list(inspect.signature(self.forward).parameters))
        if shift_labels is not None:
            labels, targets = None, shift_labels
        else:
            targets = None if labels is None else next_tokens(labels)
        if use_cache is None:  # while a loss is computed nobody reads on
            use_cache = config.use_cache and targets is None and not self.training
        tokens, past = inputs_embeds if input_ids is None else input_ids, cache
        if past_key_values is not None:
            past = compat.cache_under_its_old_name(lm, past_key_values)
        images = self._images(len(tokens), pixel_values, visual_features, image_index)
        so_far = self._text_so_far(tokens, media_locations, images, past)
        with ExitStack() as stack:
            text = (input_ids, attention_mask, so_far.media_locations, labels, inputs_embeds)
            text = stack.enter_context(self.flamingo.reading(so_far.images, *text))
            if self._is_stream():
                text = behind(text, past, lm)
                so_far.attention_mask = text.attention_mask
            weights = []
            if attentions:
                stack.enter_context(compat.eager_attention(lm))
                weights = stack.enter_context(recorded_cross_attention(self.flamingo))
            output = self.flamingo.predict(
                text, use_cache=use_cache, output_attentions=attentions, output_hidden_states=hidden,
                return_dict=True, **compat.cache_argument(lm, past), **lm_options,
            )  # fmt: skip
        if targets is not None:
            output.loss = reduced_loss(
                output.get("loss"), output.logits, targets, shift_labels is not None, loss_reduction, num_items_in_batch
            )
        output = type(output)(**output)  # in its own order, the loss first
        if use_cache and so_far.media_locations is not None:
            compat.cache_of(output).text_so_far = so_far
        if weights:
            output["cross_attentions"] = tuple(weights)
        as_dict = config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _is_stream(self) -> bool:
        """Do the pictures stand in the text itself?"""
        return isinstance(self.flamingo, LanguageStreamModel)

    def _text_so_far(
        self, tokens: Tensor, media_locations: Tensor | None, images: dict, past: Cache | None
    ) -> TextSoFar:
        """The pictures of a text up to and including this call, and where they are in it.

        tokens: (B, T_txt) or (B, T_txt, D) of this call; images: what was given with it, for `prepare_images`.
        """
        read, before = compat.tokens_read(past), getattr(past, "text_so_far", None)
        ids = tokens if tokens.ndim == 2 else None
        if self._is_stream():  # what was read stays read: only the new tokens' pictures are needed
            if media_locations is None and ids is not None:
                media_locations = ids == self.flamingo.media_token_id
            where = None if media_locations is None else media_locations[:, -tokens.shape[1] :]
            return TextSoFar(self.flamingo.prepare_images(**images), where)
        if not read:
            if media_locations is None and ids is not None:
                media_locations = ids == self.flamingo.media_token_id
            return TextSoFar(self.flamingo.prepare_images(**images), media_locations)
        if before is None:  # a cache from elsewhere: if there are pictures, only media_locations say where
            return TextSoFar(self.flamingo.prepare_images(**images), media_locations)
        if media_locations is None or media_locations.shape[1] < read + tokens.shape[1]:
            new = (
                torch.zeros_like(tokens[..., 0], dtype=torch.bool)
                if ids is None
                else ids == self.flamingo.media_token_id
            )
            earlier = before.media_locations.repeat_interleave(len(tokens) // len(before.media_locations), dim=0)
            media_locations = torch.cat([earlier[:, :read], new], dim=1)
        seen = before.images if images == {"blind": True} else self.flamingo.prepare_images(**images)
        return TextSoFar(seen, media_locations)


compat.predicts_the_next_token(FlamingoConfig.model_type, FlamingoModel)
AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(FlamingoConfig, FlamingoModel, exist_ok=True)
AutoProcessor.register(FlamingoConfig, FlamingoProcessor, exist_ok=True)
