"""LoRA beside a Flamingo: small matrices that train next to frozen ones, made and read by peft.

What this file teaches: an adapter is not a file of weights only. Its settings (which matrices, of what rank) must be
known before there is anywhere to put its weights, so they stand in config.json, and the weights in model.safetensors
with all else that the model has beside its backbones. (peft is optional: who has no adapter does not need it.)
"""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flamingo.config import LanguageConfig
from flamingo.errors import InputError
from flamingo.files import one_line, read_json
from flamingo.interop import compat

BUILT_IN = "built_in"  # the name of the adapter that belongs to the architecture (language.lora_rank)


def name_without_adapter(name: str) -> str:
    """The name that a tensor had before an adapter stood beside it."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def settings_of(config) -> dict:
    """A peft config → what JSON can hold, which peft offers as a file only."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))


def peft():
    """The library. Raises InputError where it is not installed."""
    try:
        import peft
        import peft.functional
    except ImportError:
        raise InputError("this model has a LoRA adapter: pip install peft") from None
    return peft


def config_of(settings: dict):
    """The reverse of `settings_of`. Raises InputError where peft is not installed, or they are no settings of its."""
    kind = peft().PeftConfig
    try:
        config = kind.from_peft_type(**settings)
        if config.peft_type is None:
            raise ValueError("they have no peft_type")
        return config
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"the settings of a LoRA adapter are damaged: {one_line(error)}") from error


def read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Settings and tensors that peft's `save_pretrained` wrote. Raises InputError for another folder. (Of its two kinds
    of files the older is a pickle, which is never opened.)"""
    settings = read_json(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise InputError(f"{folder} holds no adapter: it has no {file.name}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged: {one_line(error)}") from None
    return settings, {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def add_adapter(model: nn.Module, name: str, config) -> None:
    """Put a fresh adapter into a Flamingo, in place, and make it the active one.

    config: peft's. What trained before goes on training: peft freezes all but its own. Raises InputError, with the
    model as it was, for a config or a name that peft cannot take, or one that asks for the head or for rows of the
    token embeddings, where the added tokens have theirs.
    """
    _must_be_possible(model, name, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        peft().functional.inject_adapter_in_model(config, nn.ModuleDict({"flamingo": model}), name)  # named as in a
    except ValueError as error:  # `FlamingoModel`. (It comes before anything has been put in.)
        raise InputError(
            f"peft cannot put this adapter into a model that is there already: {one_line(error)}"
        ) from error
    activate(model, [name])
    for parameter in trained:
        parameter.requires_grad_(True)


def add_lora(model: nn.Module, language: LanguageConfig) -> None:
    """LoRA of rank `lora_rank` beside every matrix of the language model's own layers; it begins as a change of 0.

    It belongs to the architecture: a config says so, and whoever builds the model of that config has it.
    Raises InputError for a language model whose own weights train.
    """
    if not language.freeze:
        raise InputError("language.lora_rank: all of the language model trains (language.freeze is false): choose one")
    _, layers = compat.find_decoder_layers(model.lang_encoder, language.decoder_layers)
    own = (getattr(layer, "decoder_layer", layer).named_modules() for layer in layers)
    names = {name for layer in own for name, module in layer if isinstance(module, (nn.Linear, Conv1D))}
    pattern = rf"flamingo\.lang_encoder\.(?!.*gated_cross_attn_layer).*\.({'|'.join(map(re.escape, sorted(names)))})"
    rank = language.lora_rank
    config = peft().LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=language.lora_dropout, target_modules=pattern)
    add_adapter(model, BUILT_IN, config)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that peft has put into a model."""
    kind = peft().tuners.tuners_utils.BaseTunerLayer
    return (module for module in model.modules() if isinstance(module, kind))


def activate(model: nn.Module, names: list[str]) -> None:
    """Let these adapters act, and no other."""
    if names:
        peft().functional.set_adapter(model, names if len(names) > 1 else names[0])
    for layer in layers_of(model):
        layer.enable_adapters(enabled=bool(names))


def _must_be_possible(model: nn.Module, name: str, config) -> None:
    if not isinstance(config, peft().PeftConfig):
        raise InputError(
            f"an adapter needs a config of peft, such as LoraConfig(target_modules=[…]), not {config!r:.60}"
        )
    if any(BUILT_IN in layer.active_adapters for layer in layers_of(model)):
        raise InputError("the model was built with a LoRA of its own (language.lora_rank), and one more is too many")
    if "." in name:
        raise InputError(f"the adapter cannot be called {name!r}: its name is part of its tensors' names, so no dot")
    head = model.lang_encoder.get_output_embeddings()
    name_of_head = next(name for name, module in model.lang_encoder.named_modules() if module is head)
    targets, left_out = (getattr(config, name, None) or () for name in ("target_modules", "exclude_modules"))
    if targets == "all-linear":  # of which transformers leaves out the head as well
        config.exclude_modules = [name_of_head, *left_out]
    elif name_of_head in left_out:
        pass
    elif name_of_head in targets or (isinstance(targets, str) and re.fullmatch(targets, f"flamingo.{name_of_head}")):
        raise InputError(f"no adapter can stand beside {name_of_head}, where the added tokens' rows are: leave it out")
    if getattr(config, "trainable_token_indices", None):
        raise InputError("trainable_token_indices: the two added tokens train anyway, and the other rows stay frozen")
