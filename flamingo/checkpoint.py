"""What a run folder holds, and how it gets there whole.

    config.json          the architecture, the names of the frozen backbones and fingerprints of their weights
    model.safetensors    the trained tensors, nothing frozen, nothing pickled
    tokenizer…           the tokenizer with its two added tokens
    preprocessor_config.json   how pictures are prepared

Every file is written beside its place and then renamed into it: a kill or a full disk leaves the old one or none.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flamingo.build import build_flamingo
from flamingo.config import FlamingoConfig
from flamingo.errors import InputError
from flamingo.modeling import Flamingo
from flamingo.options import read_json
from flamingo.processor import FlamingoProcessor

WEIGHTS = "model.safetensors"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then put it in place in one step. Raises InputError when the disk is full
    or the folder cannot be written; nothing is left behind then."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}. Free some space or choose another folder") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def save_model(folder: Path, model: Flamingo, processor: FlamingoProcessor, config: FlamingoConfig) -> None:
    """Write config, trained tensors and tokenizer into `folder`."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.trainable_state_dict().items()}
    write_atomically(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))
    write_atomically(folder / "config.json", lambda temporary: temporary.write_text(config.to_json_string()))
    processor.save_pretrained(folder)


def load_trained(model: Flamingo, tensors: dict[str, Tensor], where: str) -> None:
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


def find_folder(name: str | Path, hub_options: dict) -> Path:
    """A folder, or the local copy of a hub repository. Raises InputError when there is neither."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    known = ("revision", "token", "cache_dir", "local_files_only")
    options = {key: hub_options[key] for key in known if hub_options.get(key) is not None}
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "*.txt"], **options))
    except (OSError, ValueError, HFValidationError) as error:  # no network, no such repository, no such name
        raise InputError(f"{name} is neither a folder nor a model on the hub that can be reached") from error


def read_config(folder: Path) -> FlamingoConfig:
    """config.json of a run folder. Raises InputError if it describes another kind of model or has an unknown field."""
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != FlamingoConfig.model_type:
        raise InputError(f"{folder}/config.json describes a {settings.get('model_type')!r}, not a flamingo")
    unknown = sorted(settings.keys() - FlamingoConfig().to_dict().keys())
    if unknown:
        raise InputError(
            f"{folder}/config.json has a field that FlamingoConfig does not know: {unknown[0]} (a newer version of "
            "this repository, or a typing mistake)"
        )
    return FlamingoConfig.from_dict(settings)


def load_model(folder: str | Path) -> tuple[Flamingo, FlamingoProcessor, FlamingoConfig]:
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
    model, processor = build_flamingo(config)
    load_trained(model, tensors, str(folder / WEIGHTS))
    print(
        f"{folder}: {len(tensors)} trained tensors loaded, beside {config.lm} and {config.clip_model_type}",
        file=sys.stderr,
    )
    return model.eval(), processor, config
