"""Of transformers: the cache among a model's arguments and outputs, where the decoder layers are, position ids, the
attention interface, embed_scale, quantization."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields

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
from flamingo.interop.compat.versions import unlike, with_version


# ------------------------------------------------------------------------------------------------------ the cache
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


# ---------------------------------------------------------------------------------------------- the decoder layers
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


# ----------------------------------------------------------------------------------------------- other arguments
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


# -------------------------------------------------------------------------------------------------------- configs
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


def without_quantization(lm: nn.Module) -> nn.Module:
    """The same weights in a model that does not know they were quantized once: transformers would not save it as it
    is, and would look for the GGUF when it is loaded."""
    settings = {name: value for name, value in lm.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):
        fresh = type(lm)(type(lm.config).from_dict(settings))
    fresh.load_state_dict(lm.state_dict(), assign=True)
    fresh.tie_weights()
    return fresh


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


# ----------------------------------------------------------------------------------------------------- attention
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """open_clip and transformers log what our own sentence says better."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
