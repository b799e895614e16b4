"""What a run folder holds, and how it gets there whole.

    config.json          the architecture, the names of the frozen backbones and fingerprints of their weights
    model.safetensors    the trained tensors, nothing frozen, nothing pickled
    tokenizer…           the tokenizer with its two added tokens
    preprocessor_config.json   how pictures are prepared

Every file is written beside its place and then renamed into it (files.py).
"""

import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from flamingo.config import ModelConfig, from_flat, to_flat
from flamingo.data.processor import FlamingoProcessor
from flamingo.errors import InputError
from flamingo.files import read_json, write_atomically, write_json
from flamingo.interop.backbones import Built, build_flamingo
from flamingo.model.vlm import VisionLanguageModel

WEIGHTS = "model.safetensors"
MODEL_TYPE = "flamingo"


def save_model(folder: Path, model: VisionLanguageModel, processor: FlamingoProcessor, config: ModelConfig) -> None:
    """Write config, trained tensors and tokenizer into `folder`."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.trainable_state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    write_json(folder / "config.json", {"model_type": MODEL_TYPE, **dict(sorted(to_flat(config).items()))})
    processor.save_pretrained(folder)


def load_trained(model: VisionLanguageModel, tensors: dict[str, Tensor], where: str) -> None:
    """Put trained tensors into a freshly built model. Raises InputError if names or shapes are not exactly its own."""
    own = model.trainable_state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    other_shape = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unknown or other_shape:
        example = (missing or unknown or other_shape)[0]
        raise InputError(
            f"{where} belongs to another model: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(other_shape)} of another shape (such as {example})"
        )
    model.load_state_dict(tensors, strict=False)  # strict as to what trains: checked above


def read_config(folder: Path) -> ModelConfig:
    """config.json of a run folder. Raises InputError if it describes another kind of model or has an unknown field."""
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != MODEL_TYPE:
        raise InputError(f"{folder}/config.json describes a {settings.get('model_type')!r}, not a flamingo")
    general = PreTrainedConfig().to_dict().keys() | {"model_type"}  # what transformers writes into every config
    try:
        return from_flat({name: value for name, value in settings.items() if name not in general})
    except InputError as error:
        raise InputError(f"{folder}/config.json: {error}") from None


def load_model(folder: str | Path) -> Built:
    """Rebuild the model of a run folder: backbones by name, trained tensors from the file.

    Raises InputError when the folder is no run, a file is damaged, or a backbone is not the one it was trained with.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")
    config = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise InputError(f"{folder} is no finished run: it has no {WEIGHTS}") from None
    except SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} is damaged: {error}") from None
    built = build_flamingo(config)
    load_trained(built.model, tensors, str(folder / WEIGHTS))
    print(
        f"{folder}: {len(tensors)} trained tensors loaded, beside {config.language.name} and {config.vision.name}",
        file=sys.stderr,
    )
    built.model.eval()
    return built
