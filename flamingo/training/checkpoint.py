"""What a run folder holds, and how it gets there whole.

    config.json          the architecture, the names of the frozen backbones and fingerprints of their weights
    model.safetensors    all that the model has beside its named backbones, nothing pickled (if very large, several
                         files and an index, as transformers has them)
    tokenizer…           the tokenizer with its two added tokens
    preprocessor_config.json   how pictures are prepared

Every file is written beside its place and then renamed into it (files.py).

What this file teaches: what to write must not depend on a flag that happens to be set (`requires_grad`), or weights are
lost without a word. A backbone is left out because it is found again by its name, and only as long as it is the same.
"""

import os
import sys
import tempfile
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flamingo.config import ModelConfig
from flamingo.data.processor import FlamingoProcessor
from flamingo.errors import InputError
from flamingo.fast.onednn import PackedLinear
from flamingo.files import (
    UNFINISHED,
    must_be_regular,
    one_line,
    read_json,
    sample,
    write_atomically,
    write_json,
    writing,
)
from flamingo.interop import compat
from flamingo.interop.adapters import activate, add_adapter, config_of, name_without_adapter
from flamingo.interop.backbones import Built, Quantization, build_flamingo
from flamingo.limits import checked, checked_fields, quoted
from flamingo.model.vlm import VisionLanguageModel
from flamingo.settings import from_flat, to_flat

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_TYPE = "flamingo"
DTYPES = ("float32", "bfloat16", "float16", "float64")
# In config.json: the settings of each LoRA, as peft has them, and the names of those that act.
ADAPTERS, ACTIVE = "adapters", "active_adapters"
# What a config.json may hold beside the architecture.
GENERAL = compat.general_settings() | {"model_type", ADAPTERS, ACTIVE}


# ----------------------------------------------------------------------------------------------- what is written
def own_tensors(model: VisionLanguageModel, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Name → tensor of all that is not found again by the backbones' names: what was added, what trains, and a
    backbone that has changed since it was loaded (it was trained and then frozen, or LoRA was merged into it).

    tensors: to choose from, in place of the model's own. Raises InputError for a model that was prepared to generate
    (its own matrices have been rearranged), that has tensors other than its config describes, and for a quantized
    backbone that has changed: a file of ours holds no quantized matrices.
    """
    own_parts = (model.vision_tokenizer, model.lang_encoder)
    if any(isinstance(module, PackedLinear) for part in own_parts for module in part.modules()):
        raise InputError("the model was prepared to generate and can no longer be saved: save it before")
    _must_be_as_built(model)
    loaded = getattr(model, "backbone_samples", {})  # a model built from live parts has no named backbones
    tensors = {
        name: (tensors or {}).get(name, tensor).detach()
        for name, tensor in model.named_parameters()
        if not compat.is_sharded(tensor)  # frozen, all of them (training/distributed.py)
    }
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: loaded.get(name_without_adapter(name)) for name in tensors}
    repacked = {name for name, parameter in model.named_parameters() if compat.is_repacked(parameter)}
    compared = {name: old for name, old in before.items() if old is not None and name not in repacked}
    changed = {name.partition(".")[0] for name, old in compared.items() if not _same(old, tensors[name])}
    own = {
        name: tensor
        for name, tensor in tensors.items()
        if before[name] is None or name in trains or name.partition(".")[0] in changed
    }
    plain = {name for name, _ in compat.unquantized_parameters(model)}
    if compat.is_quantized(model.lang_encoder) and own.keys() - plain:
        raise InputError(
            "the quantized language model has changed and cannot be saved: change (or merge LoRA into) a whole one"
        )
    return own


def _must_be_as_built(model: VisionLanguageModel) -> None:
    """Raises InputError if tensors have come (other than with an adapter), gone, or changed their shape since the model
    was built from its config: from which it is built again, before the file is read."""
    built = getattr(model, "built_shapes", None)
    if built is None:  # made of live parts: there is no config
        return
    tensors = dict(model.named_parameters(remove_duplicate=False))  # a tied head is apart once it is cast
    plain = {name: name_without_adapter(name) for name in tensors}
    now = {plain[name]: built.get(plain[name]) if compat.is_repacked(t) else t.shape for name, t in tensors.items()}
    has_adapter = any(name != other for name, other in plain.items())
    added = built.keys() - model.backbone_samples.keys()  # (a packed matrix of a backbone is no parameter)
    names = added | (now.keys() & built.keys() if has_adapter else now.keys())
    if other := sorted(name for name in names if now.get(name) != built.get(name)):
        raise InputError(
            f"the model has other tensors than its config describes (such as {other[0]}), and could not be loaded "
            "again: put its own embeddings and modules back before it is saved"
        )


def _same(old: Tensor, tensor: Tensor) -> bool:
    """Does a tensor still have the sample it had, whatever dtype it has been cast to since?"""
    now = sample(tensor)
    return now.shape == old.shape and bool((now == old.to(now.dtype)).all())


def save_model(
    folder: Path, model: VisionLanguageModel, processor: FlamingoProcessor, config: ModelConfig, *,
    tensors: dict[str, Tensor] | None = None, general: dict | None = None, max_shard_size: int | str = "50GB",
) -> None:  # fmt: skip
    """Write config, tensors and tokenizer into `folder`.

    tensors: in place of `own_tensors`. general: what else stands in config.json. max_shard_size: of one file.
    """
    _write_weights(folder, own_tensors(model) if tensors is None else tensors, max_shard_size)
    write_json(
        folder / "config.json", {"model_type": MODEL_TYPE, **dict(sorted(to_flat(config).items())), **(general or {})}
    )
    save_by_its_own_library(folder, processor)


def save_by_its_own_library(folder: Path, thing) -> None:
    """`thing.save_pretrained`. Other libraries write files in place and one after the other: so first into a folder of
    their own."""
    with writing(folder), tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as made:
        try:
            thing.save_pretrained(made)
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise OSError(str(error)) from error  # tokenizers has the disk's error as text only
        for file in Path(made).iterdir():
            with open(file, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(file, folder / file.name)


def _write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_size: int | str) -> None:
    """One file, or several and an index; those of an earlier save that no longer belong to it are removed last."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        some = {name: tensors[name] for name in names}
        write_atomically(folder / file, lambda path, some=some: save_file(some, path, metadata={"format": "pt"}))
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for file in (folder / WEIGHTS, *folder.glob("model-*-of-*.safetensors")):
        if file.name not in split.filename_to_tensors:
            file.unlink(missing_ok=True)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """What `_write_weights` wrote. Raises InputError for a missing or damaged file."""
    files = [WEIGHTS]
    if (folder / INDEX).exists():
        index = checked_fields(read_json(folder / INDEX), {"weight_map": dict}, f"{folder / INDEX}", ("weight_map",))
        files = sorted({checked("a file of weight_map", file, str) for file in index["weight_map"].values()})
    tensors = {}
    for file in files:
        if Path(file).name != file:
            raise InputError(f"{folder / INDEX} is damaged: it names {quoted(file)}, which is no file of this folder")
        must_be_regular(folder / file)
        try:
            tensors |= load_file(folder / file)
        except FileNotFoundError:
            raise InputError(f"{folder} is no finished run: it has no {file}") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / file} is damaged: {one_line(error)}") from None
    check_finite(tensors, str(folder), "the run went wrong, or a file is damaged: train it again")
    return tensors


def check_finite(tensors: dict[str, Tensor], where: str, way_out: str) -> None:
    """Raises InputError for a tensor with a value that is infinite or no number."""
    bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if bad:
        raise InputError(f"{where} has values that are not finite (such as in {bad}): {way_out}")


# ------------------------------------------------------------------------------------------------- what is read
def load_trained(model: VisionLanguageModel, tensors: dict[str, Tensor], where: str) -> None:
    """Put saved tensors into a freshly built model. Raises InputError if one of its own is missing, one is unknown, or
    of another shape. (Those of a backbone that is no longer the named one may be among them; a model built from live
    parts has its backbones already.)"""
    every = dict(model.named_parameters())
    own = own_tensors(model) if hasattr(model, "backbone_samples") else model.trainable_state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - every.keys())
    other_shape = [name for name in every.keys() & tensors.keys() if every[name].shape != tensors[name].shape]
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
        raise InputError(f"{folder}/config.json describes a {quoted(settings.get('model_type'))}, not a flamingo")
    try:
        for name in ("dtype", "torch_dtype"):
            if settings.get(name) not in (None, *DTYPES):
                raise InputError(f"{name} must be one of {', '.join(DTYPES)}, not {quoted(settings[name])}")
        for adapter in checked(ADAPTERS, settings.get(ADAPTERS, {}), dict).values():
            config_of(checked("an adapter", adapter, dict))
        for name in checked(ACTIVE, settings.get(ACTIVE, []), "list[str]"):
            if name not in settings.get(ADAPTERS, {}):
                raise InputError(f"{ACTIVE} names {quoted(name)}, which is not among its adapters")
        return from_flat({name: value for name, value in settings.items() if name not in GENERAL})
    except InputError as error:
        raise InputError(f"{folder}/config.json: {error}") from None


def load_model(
    folder: str | Path, config: ModelConfig | None = None, quantization: Quantization | None = None
) -> Built:
    """Rebuild the model of a run folder: backbones by name, all else from its file.

    config: in place of the folder's. quantization: of the language model, see `build_flamingo`.
    Raises InputError when the folder is no run, a file is damaged, or a backbone is not the one it was trained with.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")
    config = config or read_config(folder)
    tensors = read_weights(folder)
    built = build_flamingo(config, quantization)
    settings = read_json(folder / "config.json")
    for name, adapter in settings.get(ADAPTERS, {}).items():
        add_adapter(built.model, name, config_of(adapter))
    if ACTIVE in settings:
        activate(built.model, settings[ACTIVE])
    load_trained(built.model, tensors, str(folder / WEIGHTS))
    print(
        f"{folder}: {len(tensors)} trained tensors loaded, beside {config.language.name} and {config.vision.name}",
        file=sys.stderr,
    )
    built.model.eval()
    return built
