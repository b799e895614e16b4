"""What we rely on in other libraries' insides, in one room.

What this file teaches: a public function keeps its promise from one release to the next; the name of an argument deep
inside may not. transformers 5.24 renamed `past_key_values` to `cache`, and a model that looked for the old name took
every decode step for the beginning of a text. So a thing is recognised by what it *is*, not by what it is called, and
what is not found is an error that names the version. Nothing else in this repository names

    transformers    the cache among a model's arguments and outputs, where the decoder layers are, position ids, the
                    attention interface, embed_scale
    torch           oneDNN's own order of a matrix, an assertion that does not wait for a GPU, which weights
                    DistributedDataParallel leaves alone and FSDP2 splits
    open_clip       patch tokens of a tower (its own or timm's), its pictures' settings, QuickGELU
    timm            patch tokens and grids of features, what a name's weights were trained on

This file imports nothing of ours but the error.
"""

import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flamingo.errors import InputError

# Package, the versions that work: from this one on, before that one. (As in requirements.txt; a test compares.)
WORKING = {
    "torch": ("2.6", None),
    "transformers": ("5.4", "6"),
    "open_clip_torch": ("3.2", None),
    "datasets": ("4.4", None),
}


# ------------------------------------------------------------------------------------------------------- versions
def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def range_of(package: str) -> str:
    """Such as ">=5.4,<6"."""
    oldest, too_new = WORKING[package]
    return f">={oldest}" + (f",<{too_new}" if too_new else "")


def check_versions() -> None:
    """Raises InputError for a library outside the range that works."""
    for package, (oldest, too_new) in WORKING.items():
        found = installed(package)
        key = _number(found)
        if key < _number(oldest) or (too_new and key >= _number(too_new)):
            raise InputError(
                f"{package} {found} does not work with this repository, {range_of(package)} does: "
                "pip install -r requirements.txt -c constraints.txt"
            )


def _number(text: str) -> tuple[int, ...]:
    """`2.14.1+cpu` → (2, 14, 1)."""
    digits = text.partition("+")[0].split(".")[:3]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in digits)


def with_version(package: str) -> str:
    """Such as "transformers 5.24.0"."""
    return f"{package} {installed(package)}"


def unlike(package: str, what: str) -> InputError:
    """The error for a library that is not as we know it."""
    return InputError(
        f"{package} {installed(package)} {what}; versions {range_of(package)} were made to work: install the tested "
        "ones with pip install -r requirements.txt -c constraints.txt"
    )


# ---------------------------------------------------------------------------------------- transformers: the cache
def find_cache(values: Iterable) -> Cache | None:
    """The cache of keys and values among a call's arguments or an output's values, whatever it is called there."""
    return next((value for value in values if isinstance(value, Cache)), None)


def cache_of(output) -> Cache:
    """The cache in a language model's output. Raises InputError if there is none."""
    cache = find_cache(output.values())
    if cache is None:
        raise unlike("transformers", f"returns no cache from {type(output).__name__}")
    return cache


def as_output(cache: Cache | None) -> dict[str, Cache]:
    """{the name that outputs of this transformers have for it: cache}; nothing for None."""
    if cache is None:
        return {}
    names = [entry.name for entry in fields(CausalLMOutputWithPast) if "Cache" in str(entry.type)]
    if not names:
        raise unlike("transformers", "has no cache in CausalLMOutputWithPast")
    return {names[0]: cache}


def cache_argument(model: nn.Module, cache: Cache | None) -> dict[str, Cache]:
    """{the name that `model.forward` has for it: cache}; nothing for None. Raises InputError if it has none."""
    if cache is None:
        return {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if "Cache" in str(parameter.annotation):
            return {name: cache}
    raise unlike("transformers", f"has no cache among the arguments of {type(model).__name__}.forward")


def cache_under_its_old_name(model: nn.Module, cache: Cache) -> Cache:
    """A cache that was given as `past_key_values`; warns if this version of transformers has the new name."""
    if "cache" in inspect.signature(model.forward).parameters:
        warnings.warn("`past_key_values` is deprecated: transformers calls it `cache` now", FutureWarning, stacklevel=3)
    return cache


def tokens_read(cache: Cache | None) -> int:
    """How many tokens of each text a cache holds."""
    return 0 if cache is None else cache.get_seq_length()


def check_that_text_grows(tokens_before: int, tokens: Tensor, cache: Cache | None) -> int:
    """While a text is generated each call reads all of it again, or comes with a cache of what was read before. A call
    that does neither would take the next token for the beginning of a text, and every caption would be nonsense.

    tokens_before: read by the earlier calls. tokens: (B, T_txt, …) of this one. Returns how many are read after it.
    Raises InputError, naming the version.
    """
    if cache is None and tokens.shape[1] <= tokens_before:
        raise unlike("transformers", "goes on with a text without handing over the cache of its beginning")
    return tokens_read(cache) + tokens.shape[1]


# -------------------------------------------------------------------------------- transformers: the decoder layers
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


def position_table(lm: nn.Module) -> Tensor | None:
    """The positions (P, D) that a language model adds to its token embeddings; None if it has others (rotary ones)."""
    for name, module in lm.named_modules():
        if name.rpartition(".")[2] in ("embed_positions", "wpe") and isinstance(module, nn.Embedding):
            return module.weight
    return None


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


# --------------------------------------------------------------------------------- transformers: other arguments
def takes_position_ids(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def max_positions(config) -> int | None:
    """Tokens of the longest text, by a language model's config; None for a model that sets no limit."""
    return getattr(config, "max_position_embeddings", None)


def check_length(model: nn.Module, tokens: Tensor, read: int) -> None:
    """Raises ValueError if tokens (B, T_txt, …), behind `read` others, are none or more than there are positions."""
    if tokens.numel() == 0:
        raise ValueError(f"the batch is empty: input_ids have the shape {tuple(tokens.shape)}")
    positions, length = max_positions(model.config), read + tokens.shape[1]
    if positions is not None and length > positions:
        raise ValueError(
            f"a text of {length} tokens is longer than the {positions} positions of {model.config.model_type}: "
            "shorten it, or give fewer pictures with their captions"
        )


def embedding_scale(embedding: nn.Embedding) -> float:
    """BioGPT and Gemma multiply their token embeddings by this."""
    return getattr(embedding, "embed_scale", 1.0)


def arguments_of(lm: nn.Module) -> set[str]:
    """The names of what `lm.forward` takes: its own, those it hands on to its layers without naming them, and two that
    other versions' `generate` and Trainer pass to any model."""
    handed_on = getattr(transformers.utils, "TransformersKwargs", None)
    own = {
        name
        for name, argument in inspect.signature(lm.forward).parameters.items()
        if argument.kind != argument.VAR_KEYWORD
    }
    return own | {*getattr(handed_on, "__annotations__", ()), "cache_position", "num_items_in_batch"}


# ------------------------------------------------------------------------------------------ transformers: configs
def general_settings() -> set[str]:
    """What transformers, its Trainer or a user may set in any model's config, and what is written with it."""
    generation = GenerationConfig().to_dict().keys()  # these have stood in configs, use_cache does again
    return {*PreTrainedConfig().to_dict(), *generation, "tie_word_embeddings", "torch_dtype", "attn_implementation"}


def predicts_the_next_token(model_type: str, model_class: type) -> None:
    """Let the Trainer know that labels are what follows a token. It has a table of the classes of which that is true,
    looks there when it computes the loss itself (label_smoothing_factor), and would otherwise train a model to repeat
    what it is given."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] = model_class.__name__


def is_quantized(model: nn.Module) -> bool:
    return getattr(model, "hf_quantizer", None) is not None


def unquantized_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of those that are plain numbers: bitsandbytes has parameters, torchao tensors of its own."""
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and type(parameter.data) is Tensor:
            yield name, parameter


def try_quantization(config, dtype: torch.dtype, device: torch.device | None) -> None:
    """Quantize one small matrix by torchao, so that what it raises for a CPU, a dtype or a missing kernel is heard:
    transformers only says that a conversion failed. (bitsandbytes speaks for itself.) Raises InputError."""
    if not isinstance(config, transformers.TorchAoConfig):
        return
    from torchao.quantization import quantize_

    try:
        quantize_(nn.Sequential(nn.Linear(256, 256, bias=False, dtype=dtype, device=device)), config.quant_type)
    except Exception as error:  # of many kinds, an assertion among them
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{with_version('torchao')} cannot do {type(config.quant_type).__name__} here ({reason}): on a "
            "CPU Int8WeightOnlyConfig() works, and for 4 bits IntxWeightOnlyConfig(weight_dtype=torch.int4)"
        ) from error


def is_repacked(parameter: Tensor) -> bool:
    """Has bitsandbytes put a 4 bit matrix into another order for this CPU? It does when it first multiplies by it."""
    return getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False)


def set_training(lm: nn.Module, mode: bool, own_weights_train: bool) -> None:
    """train() or eval() for a language model: frozen, it stays in eval, but not the dropout of adapters beside it."""
    lm.train(mode and own_weights_train)
    for name, module in lm.named_modules():
        if "lora_dropout" in name:  # peft's name
            module.train(mode)


def name_adapters(model: nn.Module, configs: dict) -> None:
    """Let a `PreTrainedModel` know the adapters that are in it already, by name, as its `add_adapter` would have."""
    model._hf_peft_config_loaded, model.peft_config = True, configs


# --------------------------------------------------------------------------------------- transformers: attention
def register_attention(name: str, attention: Callable) -> None:
    """Let language models call `attention` under this name, with the masks of sdpa."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_name(model: nn.Module) -> str | None:
    """Which attention a language model uses: sdpa, eager, … or one of ours."""
    return model.config._attn_implementation


def set_attention(model: nn.Module, name: str) -> None:
    model.set_attn_implementation(name)


@contextlib.contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Inside, a language model computes attention in the one way that keeps the weights."""
    name = attention_name(model)
    try:
        set_attention(model, "eager")
        yield
    finally:
        set_attention(model, name)


def requested_attention(config) -> str | None:
    """What a config was given as `attn_implementation`, None if nothing."""
    return config._attn_implementation


def note_attention(config, name: str | None) -> None:
    """Let a config say which attention its model uses."""
    config._attn_implementation = name


def sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options) -> Tensor:
    """transformers' own attention by torch: (B, h, T, c) each → (B, T, h, c)."""
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


# ----------------------------------------------------------------------------------- torch: default dtype
@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new tensors are of this dtype, whatever a library has set for the model that it is building."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)


# --------------------------------------------------------------------------------------------- torch: assertions
def check_values(holds: Tensor, mistake: Callable[[int], str]) -> None:
    """Raises ValueError unless all of `holds` (N, …), bool, is True: `mistake(i)` is the sentence for the first that is
    not.

    To look at the values of a tensor on a GPU is to wait for all its work. There the GPU checks by itself, without a
    wait, and its program ends with an assertion (torch's own, which is private). So it is in a traced or exported call,
    where the values are not there yet.
    """
    if holds.device.type == "cpu" and not torch.compiler.is_compiling():
        if not holds.all():
            raise ValueError(mistake(int((~holds).nonzero()[0, 0])))
    else:
        torch._assert_async(holds.all(), "a check of image_index or <image> tokens failed: on a CPU it has a sentence")


# ------------------------------------------------------------------------------------------------- torch: oneDNN
def has_onednn(dtype: torch.dtype) -> bool:
    """Does this torch multiply by oneDNN on this CPU, in this dtype, and can a matrix be kept in oneDNN's order?"""
    if not torch.backends.mkldnn.is_available():
        return False
    operators = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    missing = [name for name in operators if not hasattr(torch.ops.mkldnn, name)]
    if missing:
        raise unlike("torch", f"has no oneDNN operator {missing[0]}")
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def without_onednn_warning() -> str | None:
    """A sentence for a torch that has no oneDNN; None if it has."""
    if torch.backends.mkldnn.is_available():
        return None
    return (
        f"torch {installed('torch')} has no oneDNN, so generating on this CPU takes about twice as long: the package "
        f"index's own builds {range_of('torch')} have it"
    )


def onednn_order(weight: Tensor) -> Tensor:
    """A matrix (D_out, D_in) as oneDNN reads it; only `onednn_linear` understands it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, D_in) times a matrix of `onednn_order` → (…, D_out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """torch takes oneDNN for every product in bfloat16 unless it is switched off, for the whole process."""
    was_enabled = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = False
        yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled


# ------------------------------------------------------------------------------------------ torch.distributed
def data_parallel(model: nn.Module, frozen: list[str]) -> nn.parallel.DistributedDataParallel:
    """The model in a DistributedDataParallel that leaves these parameters alone: they are neither sent round at its
    start nor expected to get a gradient. (In torch the way to say so has no public name yet.)"""
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(model, frozen)
    named = inspect.signature(ddp).parameters  # no buffer changes while a model trains
    return ddp(model, **{"forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers": False})


def fully_shard_around(whole: set[nn.Parameter], device_type: str) -> Callable:
    """FSDP2's `fully_shard`, over all processes, that leaves some parameters whole. Raises InputError if torch is too
    old for that."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not can_shard():
        raise InputError(f"--shard needs torch 2.7 or newer, and {installed('torch')} is installed")
    # It fears for what changes a layer's output in place, and nothing does: its gradients are tested against the whole.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    return functools.partial(fully_shard, mesh=mesh, ignored_params=whole)


def can_shard() -> bool:
    """Can `fully_shard` leave some parameters whole?"""
    from torch.distributed.fsdp import fully_shard

    return "ignored_params" in inspect.signature(fully_shard).parameters


def fetch_before(sharded: nn.Module, methods: Iterable[str]) -> None:
    """Let these methods find the weights whole, as forward does."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for method in methods:
        register_fsdp_forward_method(sharded, method)


def is_sharded(parameter: Tensor) -> bool:
    """Is only a piece of it in this process?"""
    return hasattr(parameter, "device_mesh")


# ------------------------------------------------------------------------------------------ open_clip and timm
def open_clip_patches(tower: nn.Module, pixel_values: Tensor, *, norm: bool, class_token: bool) -> Tensor:
    """(N, C, H, W) → the patch tokens of the last layer (N, v, d), the class token first if asked for.

    `visual(x)[1]` would silently be the second picture of timm's towers.
    """
    if hasattr(tower, "trunk"):
        return timm_patches(tower.trunk, pixel_values, norm=norm, class_token=class_token)
    if not hasattr(tower, "forward_intermediates"):
        raise unlike("open_clip_torch", f"has a tower {type(tower).__name__} without forward_intermediates")
    result = tower.forward_intermediates(
        pixel_values, indices=1, normalize_intermediates=norm, intermediates_only=True, output_fmt="NLC",
        output_extra_tokens=class_token,
    )  # fmt: skip
    features = result["image_intermediates"][-1]
    if class_token:
        features = torch.cat([result["image_intermediates_prefix"][-1][:, :1], features], dim=1)
    return features


def timm_patches(tower: nn.Module, pixel_values: Tensor, *, norm: bool, class_token: bool) -> Tensor:
    """(N, C, H, W) → the last features (N, v, d): of a transformer its patch tokens, the class token first if asked
    for; of a convolutional network the places of its grid, row by row. (Its last *stage*, which forward_intermediates
    gives, is not always its last features: EfficientNet widens them once more.)"""
    features = tower.forward_features(pixel_values)
    if features.ndim == 4:
        if features.shape[1] != tower.num_features:  # (N, H', W', d), as Swin has it
            features = features.permute(0, 3, 1, 2)
        return features.flatten(2).transpose(1, 2)
    prefix = tower.num_prefix_tokens
    if not norm:
        found = tower.forward_intermediates(
            pixel_values, indices=1, norm=False, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )[-1]
        features = torch.cat([found[1], found[0]], dim=1) if isinstance(found, tuple) else found
    patches = features[:, prefix:]
    return torch.cat([features[:, :1], patches], dim=1) if class_token else patches


def timm_config(name: str):
    """What timm knows of the weights of a name (input_size, mean, std, has_weights, …). Raises InputError."""
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(name):
        raise InputError(f"timm has no model named {name!r}: see timm.list_models()")
    return get_pretrained_cfg(name)


def without_quantization(lm: nn.Module) -> nn.Module:
    """The same weights in a model that does not know they were quantized once: transformers would not save it as it
    is, and would look for the GGUF when it is loaded."""
    settings = {name: value for name, value in lm.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):
        fresh = type(lm)(type(lm.config).from_dict(settings))
    fresh.load_state_dict(lm.state_dict(), assign=True)
    fresh.tie_weights()
    return fresh


def open_clip_image_and_patches(tower: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) → the embedding of each picture (N, E) and its patch tokens after the final norm (N, v, d)."""
    result = tower.forward_intermediates(pixel_values, indices=1, normalize_intermediates=True, output_fmt="NLC")
    return result["image_features"], result["image_intermediates"][0]


def has_class_token(tower: nn.Module) -> bool:
    trunk = getattr(tower, "trunk", tower)  # timm's tower inside open_clip's
    return getattr(trunk, "cls_token", getattr(trunk, "class_embedding", None)) is not None


def trained_with_quick_gelu(model_name: str, pretrained: str) -> tuple[bool, bool]:
    """(the weights were trained with QuickGELU, the model computes it). open_clip only warns where they differ."""
    import open_clip

    weights = (open_clip.get_pretrained_cfg(model_name, pretrained) or {}).get("quick_gelu", False)
    return weights, open_clip.get_model_config(model_name).get("quick_gelu", False)


def open_clip_transform(settings: dict) -> Callable:
    """PIL picture → (C, H, W), by the fields of open_clip's PreprocessCfg."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(**settings), is_train=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """open_clip and transformers log what our own sentence says better."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------------- transformers: its CLIP's vision half
def hugging_face_patches(tower: nn.Module, pixel_values: Tensor, *, norm: bool, class_token: bool) -> Tensor:
    """(N, C, H, W) → the tokens of the last layer (N, v, d), without the class token unless asked for."""
    tokens = tower(pixel_values=pixel_values).last_hidden_state  # (N, 1 + v, d), before the final norm
    tokens = tokens if class_token else tokens[:, 1:]
    inner = getattr(tower, "vision_model", tower)  # where the norm is has changed once
    if not hasattr(inner, "post_layernorm"):
        raise unlike("transformers", f"has a {type(tower).__name__} without post_layernorm")
    return inner.post_layernorm(tokens) if norm else tokens
