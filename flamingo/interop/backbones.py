"""The two frozen backbones, by name, and the model around them.

What this file teaches: where a Flamingo's frozen halves come from. A vision encoder is named

    ViT-L-14-quickgelu:openai          open_clip name : pretrained tag
    hf-hub:…   local-dir:…             open_clip, towers of its own or of timm
    openai/clip-vit-base-patch32       a Hugging Face CLIP, id or folder
    timm:NAME   timm:NAME:FILE         a network of timm, with its own weights or those of a file (timm_encoders.py)
    efficientnet-lite2                 a package brings it (packaged.py)
    asset:classroom/clip               what this repository brings along

and a language model by Hugging Face id, folder, `asset:…`, or `smollm2-135m`, which a package brings. A missing weight
file never becomes a random encoder.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from flamingo.config import LinearConfig, ModelConfig, layers_with_cross_attention
from flamingo.data.preprocess import Preprocess
from flamingo.data.processor import FlamingoProcessor, add_flamingo_tokens
from flamingo.errors import InputError
from flamingo.files import fingerprint, one_line, resolve, sample
from flamingo.interop import adapters, compat, hub, packaged, timm_encoders
from flamingo.limits import must_fit
from flamingo.model.build import FUSIONS, TOKENIZERS, build_from_parts, make_vision_tokenizer
from flamingo.model.cross_attention import GatedCrossAttentionBlock
from flamingo.model.palm import PaLMForCausalLM  # noqa: F401 (transformers then knows its folders)
from flamingo.model.vision import HuggingFaceClipEncoder, OpenClipEncoder, VisionEncoder
from flamingo.model.vlm import SpecialTokens, VisionLanguageModel


# --------------------------------------------------------------------------------------------- the vision encoder
def _quick_gelu_must_match(model_name: str, pretrained: str) -> None:
    """open_clip only warns when weights trained with QuickGELU meet a model without it; the features are wrong then."""
    trained_with, computes = compat.trained_with_quick_gelu(model_name, pretrained)
    if trained_with != computes:
        other = f"{model_name}-quickgelu" if trained_with else model_name.removesuffix("-quickgelu")
        what = "with" if trained_with else "without"
        raise InputError(f"the weights {pretrained} were trained {what} QuickGELU: ask for {other}:{pretrained}")


def _load_open_clip(name: str, norm: bool, class_token: bool) -> VisionEncoder:
    import open_clip

    folder = Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None
    if folder and not (folder / "open_clip_config.json").is_file():
        raise InputError(f"{folder} is no open_clip folder: it has no open_clip_config.json")
    model_name, pretrained = name, None
    if not name.startswith(("hf-hub:", "local-dir:")):
        model_name, _, pretrained = name.partition(":")
        known = open_clip.list_pretrained_tags_by_model(model_name)
        if model_name not in open_clip.list_models():
            raise InputError(f"open_clip has no model named {model_name!r}: see open_clip.list_models()")
        if pretrained not in known and not Path(pretrained).is_file():
            raise InputError(
                f"{model_name} has no weights {pretrained!r}: choose one of {', '.join(known) or '(none)'}"
            )
        _quick_gelu_must_match(model_name, pretrained)
    on_hub = None if folder else name.removeprefix("hf-hub:") if pretrained is None else ""
    if pretrained in open_clip.list_pretrained_tags_by_model(model_name):
        on_hub = open_clip.get_pretrained_cfg(model_name, pretrained).get("hf_hub", "").strip("/")
    with _loading(f"the vision encoder {name}", str(folder or ""), on_hub):
        if pretrained is None and compat.has_text_of_transformers(name):  # as BiomedCLIP
            clip = compat.open_clip_without_text(name)
        else:
            clip = open_clip.create_model(model_name, pretrained=pretrained, precision="fp32", require_pretrained=True)
        _all_finite(clip.visual)
    preprocess = Preprocess({"library": "open_clip", **open_clip.get_model_preprocess_cfg(clip)})
    return OpenClipEncoder(clip.visual, name, preprocess, norm, class_token)  # the text tower is dropped


def _load_hugging_face_clip(name: str, norm: bool, class_token: bool) -> VisionEncoder:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionModel

    folder_or_id = os.path.expanduser(name)
    with _loading(f"the vision encoder {name}", folder_or_id, None if Path(folder_or_id).is_dir() else name):
        kind = CLIPConfig.get_config_dict(folder_or_id)[0].get("model_type", "clip")
        if kind not in ("clip", "clip_vision_model"):
            raise InputError(f"it is a model of the kind {kind!r}, not a CLIP")
        tower, found = CLIPVisionModel.from_pretrained(folder_or_id, dtype=torch.float32, output_loading_info=True)
        _all_there(found)
        _all_finite(tower)
        processor = CLIPImageProcessor.from_pretrained(folder_or_id)
    preprocess = Preprocess({"library": "transformers", **json.loads(processor.to_json_string())})
    return HuggingFaceClipEncoder(tower, name, preprocess, norm, class_token)


@contextlib.contextmanager
def _loading(what: str, folder_or_id: str, on_hub: str | None = None) -> Iterator[None]:
    """What a library raises for a name, a folder or a file that is not as it should be → InputError. There is no end to
    the kinds: each file format has its own, and a config with a wrong number fails wherever that is first used.

    on_hub: the repository it comes from, "" if it comes from some; None if it is on this machine.
    """
    place = Path(folder_or_id)
    if (place.is_absolute() or folder_or_id.startswith(".")) and not place.is_dir():
        raise InputError(f"cannot load {what}: there is no folder {place}")
    no_hub = on_hub is not None and not hub.is_there_a_hub()
    try:
        with compat.quiet():
            yield
    except InputError as error:
        raise InputError(f"cannot load {what}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        if no_hub:
            raise InputError(f"cannot load {what}: {hub.how_to_do_without(on_hub)}") from error
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise InputError(f"cannot load {what}: {kind}{one_line(error)}") from error


def _all_there(found: dict) -> None:
    """Raises InputError if the weight file lacks tensors: transformers would go on with random ones."""
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"its weight file lacks {len(missing)} tensors, such as {missing[0]}")


def _all_finite(module: torch.nn.Module) -> None:
    if bad := [name for name, value in compat.unquantized_parameters(module) if not value.isfinite().all()]:
        raise InputError(f"its weights are not finite, such as those of {bad[0]}")


def load_vision_encoder(
    name: str, *, norm: bool = True, class_token: bool = False, image_size: int | None = None
) -> VisionEncoder:
    """Load a frozen encoder by name (see the top of this file).

    norm: features after the tower's final norm; False reproduces what open_flamingo and flamingo-mini were trained
    on (the option `vision_feature_norm`).
    class_token: keep the class token, as the first of the v, as flamingo-mini does (the option `vision_class_token`).
    image_size: side of the pictures in pixels, if not that of its training (the option `vision_image_size`).

    Raises InputError when the name is unknown, the weights are missing, QuickGELU does not match, a class token is
    asked of a tower that has none, or a size of one that cannot take it.
    """
    if name.startswith("timm:") or name in packaged.VISION_ENCODERS:
        with _loading(f"the vision encoder {name}", "", None if name.count(":") != 1 else ""):
            encoder = timm_encoders.load(name, norm, class_token, image_size)
            _all_finite(encoder)
        return encoder
    if image_size is not None:
        raise InputError(f"the size of pictures can be set for encoders of timm only, not for {name}: leave it out")
    if name.startswith("asset:"):
        return _load_open_clip(f"local-dir:{resolve(name)}", norm, class_token)
    if name.startswith(("hf-hub:", "local-dir:")) or (":" in name and "/" not in name.partition(":")[0]):
        return _load_open_clip(name, norm, class_token)
    if "/" not in name and not Path(name).is_dir():
        raise InputError(
            f"cannot tell what vision encoder {name!r} is: write NAME:PRETRAINED for open_clip "
            "(ViT-L-14-quickgelu:openai), hf-hub:…, local-dir:…, or a Hugging Face CLIP id or folder"
        )
    return _load_hugging_face_clip(name, norm, class_token)


# ---------------------------------------------------------------------------------------------- the language model
class Quantization(NamedTuple):
    """4 or 8 bits a weight. config: one of transformers'. dtype: of what is not quantized, and of what is multiplied
    by what is. device: where it is done; None is for the library to choose."""

    config: object
    dtype: torch.dtype
    device: torch.device | None = None


def load_language_model(name: str, quantization: Quantization | None = None, max_tokens: int = 0):
    """A causal language model in float32 and its tokenizer, by name (see the top of this file).

    max_tokens: of the longest text that it is to read. Raises InputError when either cannot be loaded, is not whole, or
    brings code of its own, which is never run; and, before its weights are read, if it has fewer positions than
    max_tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for a file that loads in a second only hides what matters
    packed = name in packaged.LANGUAGE_MODELS
    folder_or_id = str(packaged.language_model_folder(name)) if packed else os.path.expanduser(resolve(name))
    with _loading(f"the language model {name}", folder_or_id, None if Path(folder_or_id).is_dir() else name):
        try:  # False: the default is to ask, in the middle of a run
            config = AutoConfig.from_pretrained(folder_or_id, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder_or_id, trust_remote_code=False)
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise InputError(
                "it brings code of its own, which is never run here: choose a model that transformers knows"
            ) from error
        _knows_words(tokenizer)
        positions = compat.max_positions(config)
        if positions is not None and max_tokens > positions:
            raise InputError(
                f"texts of --max-tokens {max_tokens} are longer than its {positions} positions: lower --max-tokens to "
                f"{positions}"
            )
        # The library's default dtype is that of the file: OPT would come as float16.
        options = {"dtype": torch.float32}
        if quantization is not None:
            compat.try_quantization(*quantization)
            options = {"dtype": quantization.dtype, "quantization_config": quantization.config}
            options |= {} if quantization.device is None else {"device_map": {"": quantization.device}}
        lm, found = AutoModelForCausalLM.from_pretrained(
            folder_or_id, config=config, trust_remote_code=False, output_loading_info=True, **options
        )
        _all_there(found)
        _all_finite(lm)
        rows = lm.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise InputError(f"its tokenizer has {len(tokenizer)} tokens, but its embeddings are {rows}")
    return lm, tokenizer


def load_tokenizer(name: str):
    """The tokenizer of a language model, alone. Raises InputError when it cannot be loaded or is empty."""
    from transformers import AutoTokenizer

    folder_or_id = os.path.expanduser(resolve(name))
    with _loading(f"the tokenizer of {name}", folder_or_id):
        tokenizer = AutoTokenizer.from_pretrained(folder_or_id, trust_remote_code=False)
        _knows_words(tokenizer)
    return tokenizer


def _knows_words(tokenizer) -> None:
    """Raises InputError for the empty tokenizer that transformers makes where a folder has none."""
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise InputError("it has no tokenizer: put the files of its tokenizer (tokenizer.json, …) into its folder")


# ----------------------------------------------------------------------------------------------------- all of it
class Built(NamedTuple):
    """config: the one it was built from, with the widths and fingerprints that were found."""

    model: VisionLanguageModel
    processor: FlamingoProcessor
    config: ModelConfig


def build_flamingo(config: ModelConfig, quantization: Quantization | None = None, max_tokens: int = 0) -> Built:
    """A model with fresh trained parts (seed torch first), and the processor that belongs to it.

    quantization: of the language model, whose fingerprint is then taken on trust.
    max_tokens: of the longest text that it is to be trained with.
    Raises InputError when a backbone cannot be loaded, has another width than the config says, other weights than the
    config's fingerprint, or too few positions for max_tokens; or a library is too old or new.
    """
    compat.check_versions()
    vision, language = config.vision, config.language
    lm, tokenizer = load_language_model(language.name, quantization, max_tokens)
    encoder = load_vision_encoder(
        vision.name, norm=vision.feature_norm, class_token=vision.class_token, image_size=vision.image_size
    )
    found = dataclasses.replace(
        config,
        linear=_with_patches(config, encoder),
        vision=_as_found("dim_visual", vision, encoder.dim, encoder.fingerprint),
        language=_as_found(
            "dim", language, lm.config.hidden_size, fingerprint(lm) if quantization is None else language.fingerprint
        ),
    )
    _must_fit(found, lm.config.num_hidden_layers, lm.get_input_embeddings())
    add_flamingo_tokens(tokenizer)
    processor = FlamingoProcessor(tokenizer, encoder.preprocess)
    tokens = SpecialTokens(processor.media_token_id, processor.eoc_token_id, processor.pad_token_id)
    model = build_from_parts(found, encoder, lm, tokens, encoder.dim)
    model.backbone_samples = _backbone_samples(model)
    model.built_shapes = {name: t.shape for name, t in model.named_parameters(remove_duplicate=False)}
    if language.lora_rank:
        adapters.add_lora(model, language)
    return Built(model, processor, found)


def _with_patches(config: ModelConfig, encoder: VisionEncoder) -> LinearConfig:
    """The linear projection's settings with the number of patches found, which they may not contradict."""
    linear = config.linear
    if not config.is_built("linear"):
        return linear
    with torch.no_grad():
        patches = encoder(torch.zeros(1, 3, *encoder.image_size)).shape[1]
    if linear.num_patches not in (None, patches):
        raise InputError(
            f"the config says linear_num_patches={linear.num_patches}, but the vision encoder gives {patches}: leave "
            "linear_num_patches out"
        )
    return dataclasses.replace(linear, num_patches=patches)


def _backbone_samples(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Name → sample of each tensor that comes from a backbone, by which a later save knows whether it is the same.

    Under all its names: the head's matrix may be the token embeddings, and is a tensor of its own in bfloat16.
    """
    added = {id(tensor) for part in (model.vision_tokenizer, *model.added_parts()) for tensor in part.parameters()}
    return {
        name: sample(tensor)
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if id(tensor) not in added
    }


def _must_fit(config: ModelConfig, decoder_layers: int, embeddings: torch.nn.Embedding) -> None:
    """Raises InputError if the trained parts are larger than this machine's memory. (On the device "meta" they can be
    counted without being made.)"""
    if config.tokenizer_type not in TOKENIZERS or config.fusion_type not in FUSIONS:
        return  # `build_from_parts` says so
    fusion, d, blocks = config.fusion, config.vision.dim, 0
    if config.is_built("fusion"):
        blocks = len(layers_with_cross_attention(decoder_layers, fusion.every, fusion.placement))
    with torch.device("meta"):
        tokenizer = make_vision_tokenizer(config, d, embeddings)
        block = GatedCrossAttentionBlock(dim=config.language.dim, dim_visual=d, **fusion.block_settings())
    numbers = sum(p.numel() for p in tokenizer.parameters()) + blocks * sum(p.numel() for p in block.parameters())
    must_fit(4 * numbers, "the trained parts", "lower what --set or config.json asks for (depth, heads, …)")


def _as_found(what: str, part, dim: int, weights: str):
    """A backbone's config with its width and the fingerprint of its weights, which may not contradict it."""
    if part.dim not in (None, dim):
        raise InputError(f"the config says {what}={part.dim}, but the backbone has {dim}: leave {what} out")
    if part.fingerprint not in (None, weights):
        raise InputError(
            f"this model was trained with other weights than {part.name} has now "
            f"(fingerprint {part.fingerprint}, found {weights}): point at the weights it was trained with"
        )
    return dataclasses.replace(part, dim=dim, fingerprint=weights)
