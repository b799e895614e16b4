"""LoRA beside a Flamingo: small matrices that train next to frozen ones, made and read by peft.

What this file teaches: an adapter is not a file of weights only. Its settings (which matrices, of what rank) must be
known before there is anywhere to put its weights, so they stand in config.json, and the weights in model.safetensors
with all else that the model has beside its backbones. (peft is optional: who has no adapter does not need it.)
"""

import json
import tempfile
from pathlib import Path

from torch import nn

from flamingo.errors import InputError
from flamingo.files import one_line


def name_without_adapter(name: str) -> str:
    """The name that a tensor had before an adapter stood beside it."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def settings_of(config) -> dict:
    """A peft config → what JSON can hold, which peft offers as a file only."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))


def config_of(settings: dict):
    """The reverse of `settings_of`. Raises InputError where peft is not installed, or they are no settings of its."""
    try:
        from peft import PeftConfig
    except ImportError:
        raise InputError("this model has a LoRA adapter: pip install peft") from None
    try:
        config = PeftConfig.from_peft_type(**settings)
        if config.peft_type is None:
            raise ValueError("they have no peft_type")
        return config
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"the settings of a LoRA adapter are damaged: {one_line(error)}") from error


def add_adapter(model: nn.Module, name: str, config) -> None:
    """Put a fresh adapter into a Flamingo, in place, and make it the active one.

    config: peft's. What trained before goes on training: peft freezes all but its own.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(config, nn.ModuleDict({"flamingo": model}), name)  # named as in a `FlamingoModel`
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(name)
    for parameter in trained:
        parameter.requires_grad_(True)
