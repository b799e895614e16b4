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

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flamingo.data.processor import MEDIA_TOKEN, FlamingoProcessor
from flamingo.errors import InputError
from flamingo.files import find_folder
from flamingo.interop import compat
from flamingo.interop.backbones import Built, build_flamingo
from flamingo.interop.huggingface_config import FlamingoConfig
from flamingo.interop.selfcheck import check_decoding
from flamingo.model.language_model import FlamingoLayer
from flamingo.training.checkpoint import load_model, save_model


class FlamingoModel(PreTrainedModel, GenerationMixin):
    """A Flamingo with the methods of a Hugging Face model.

    `FlamingoModel(config)` loads the two frozen backbones by name and makes fresh trained parts;
    `FlamingoModel.from_pretrained(folder_or_hub_name)` also loads what was trained.

    Attributes: flamingo, the model itself; processor, the `FlamingoProcessor` that belongs to it.
    """

    config_class = FlamingoConfig
    base_model_prefix = "flamingo"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")

    def __init__(self, config: FlamingoConfig | None, built: Built | None = None):
        """built: a model that is there already, with its own config; the config given is then not read."""
        built = built or build_flamingo(config.model_config())
        super().__init__(FlamingoConfig.of_model_config(built.config))
        self.flamingo, self.processor = built.model, built.processor
        self._decodes_rightly = False  # not checked yet

    # ------------------------------------------------------------------------------------------ load and save
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *_, dtype=None, device_map=None, **options
    ) -> "FlamingoModel":
        """The model of a run folder, or of a repository on the hub.

        dtype: of all weights; float32 if not given. device_map: one device, such as "cuda"; a model this small is not
        spread over several. options: revision, token, cache_dir and local_files_only of a hub.
        Raises InputError when there is no such folder, a file is damaged, or a backbone is not the right one.
        """
        if isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            raise InputError(f"device_map={device_map!r}: name one device, such as 'cuda'")
        built = load_model(find_folder(pretrained_model_name_or_path, options))
        model = cls(None, built).eval()
        model = model if device_map is None else model.to(device_map)
        return model if dtype in (None, "auto") else model.to(dtype)

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **hub_options) -> None:
        """Write config, trained tensors (nothing frozen), tokenizer and preprocessing: what `from_pretrained` reads."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, self.flamingo, self.processor, self.config.model_config())
        if push_to_hub:
            self.push_to_hub(hub_options.pop("repo_id", folder.name), **hub_options)

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

    def parameters_trainable(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.flamingo.parameters() if parameter.requires_grad)

    def state_dict_trainable(self) -> dict[str, Tensor]:
        """Name → tensor of what trains, as in the checkpoint."""
        return self.flamingo.trainable_state_dict()

    def get_modified_layers(self) -> list[FlamingoLayer]:
        """The decoder layers that look at pictures, first to last."""
        return self.flamingo.lang_encoder._get_decoder_layers()

    def get_input_embeddings(self) -> nn.Module:
        return self.flamingo.lang_encoder.get_input_embeddings()

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
        **lm_options,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T_txt, vocabulary) of the next token, and the mean loss if there are labels.

        Args:
            input_ids, attention_mask, labels: (B, T_txt); labels are -100 where there is no loss.
            inputs_embeds: (B, T_txt, D) in place of input_ids, with media_locations.
            media_locations: (B, T_txt) bool; at the <image> tokens if not given. With a cache, of the whole
                text so far.
            pixel_values: see `encode_resample_visuals`; visual_features: what it returns. Neither: no pictures.
            image_index: (B, T_img); pixel_values or visual_features are then a bank (N, …), see `Flamingo`.
            cache, or past_key_values, its name before transformers 5.24: keys and values of the text so far.
            use_cache, lm_options (output_hidden_states, …): the language model's own.
        """
        texts = len(inputs_embeds if input_ids is None else input_ids)
        cache = compat.cache_argument(self.flamingo.lang_encoder, past_key_values if cache is None else cache)
        return self.flamingo(
            input_ids, attention_mask, labels, media_locations=media_locations, inputs_embeds=inputs_embeds,
            **self._images(texts, pixel_values, visual_features, image_index), **cache, use_cache=use_cache,
            **lm_options,
        )  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        media_locations: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        image_index: Tensor | None = None,
        **generation_options,
    ) -> Tensor:
        """Continue texts, prompt included: `Flamingo.generate` with the arguments of `forward`."""
        images = self._images(len(input_ids), pixel_values, visual_features, image_index)
        return self.flamingo.generate(
            input_ids, attention_mask, media_locations=media_locations, **images, **generation_options
        )

    def compute_transition_scores(self, *args, **options) -> Tensor:
        """Log-probability of each generated token: the language model's, which knows how many tokens there are."""
        return self.flamingo.lang_encoder.compute_transition_scores(*args, **options)

    def generate_captions(
        self,
        processor: FlamingoProcessor,
        images: Image.Image | Sequence[Image.Image] | None = None,
        pixel_values: Tensor | None = None,
        prompt: str = MEDIA_TOKEN,
        **generation_options,
    ) -> list[str]:
        """One caption for each picture (with num_return_sequences=k, k for each, side by side).

        images: PIL pictures or files. pixel_values: (N, C, H, W) or (N, F, C, H, W) instead. prompt: with one <image>;
        it is not part of what comes back.
        """
        if (images is None) == (pixel_values is None):
            raise ValueError("give images or pixel_values, one of them")
        if prompt.count(MEDIA_TOKEN) != 1:
            raise ValueError(f"the prompt {prompt!r} must have exactly one {MEDIA_TOKEN}: each picture has a text")
        if not self._decodes_rightly:
            check_decoding(self.flamingo)
            self._decodes_rightly = True
        if pixel_values is None:
            pixel_values = processor.preprocess_images(images)
        elif pixel_values.ndim == 4:
            pixel_values = rearrange(pixel_values, "N C H W -> N 1 C H W")
        text = processor.encode_text([prompt] * len(pixel_values)).to(self.device)
        generated = self.generate(
            **text, pixel_values=pixel_values.to(self.device, self.dtype)[:, None], **generation_options
        )
        return processor.decode_captions(generated, text["input_ids"].shape[1])

    def score_sequences(
        self,
        input_ids: Tensor,
        candidates: Sequence[Sequence[int]],
        attention_mask: Tensor | None = None,
        media_locations: Tensor | None = None,
        pixel_values: Tensor | None = None,
        visual_features: Tensor | None = None,
        image_index: Tensor | None = None,
        mean: bool = False,
    ) -> Tensor:
        """Log-likelihood (B, K) of K candidate continuations: `Flamingo.score_sequences` with these arguments."""
        images = self._images(len(input_ids), pixel_values, visual_features, image_index)
        return self.flamingo.score_sequences(
            input_ids, candidates, attention_mask, media_locations=media_locations, mean=mean, **images
        )


AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig, exist_ok=True)
AutoModelForImageTextToText.register(FlamingoConfig, FlamingoModel, exist_ok=True)
AutoProcessor.register(FlamingoConfig, FlamingoProcessor, exist_ok=True)
