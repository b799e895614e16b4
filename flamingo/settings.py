"""The fields of a ModelConfig by name: `fusion.heads` on the command line, `xattn_heads` in a config.json.

What this file teaches: a field has one name in the code, and every other name is a row of a table. On the command line
it is the part and the field (`--set fusion.heads=4`). In config.json the names are flat and, where it has one,
flamingo-mini's: the table FLAT is all there is between the two. (Imports nothing heavy.)
"""

import dataclasses
import functools

from flamingo.config import ModelConfig
from flamingo.errors import InputError
from flamingo.limits import checked, quoted

# Those of flamingo-mini that are not simply a part's prefix and a field's name.
_FLAT_BY_NAME = {
    "lm": "language.name", "dim": "language.dim", "freeze_language_model": "language.freeze",
    "decoder_layers_attr_name": "language.decoder_layers", "lm_lora_rank": "language.lora_rank",
    "lm_lora_dropout": "language.lora_dropout",
    "lm_fingerprint": "language.fingerprint",
    "clip_model_type": "vision.name", "dim_visual": "vision.dim", "freeze_vision_model": "vision.freeze",
    "vision_feature_norm": "vision.feature_norm", "vision_class_token": "vision.class_token",
    "vision_fingerprint": "vision.fingerprint", "vision_image_size": "vision.image_size",
    "resampler_num_time_embeds": "tokenizer.max_num_frames",
    "only_attend_immediate_media": "fusion.only_immediate_media",
    "tokenizer_type": "tokenizer_type", "fusion_type": "fusion_type",
}  # fmt: skip
_PREFIX = {"resampler_": "tokenizer", "qformer_": "qformer", "linear_": "linear", "xattn_": "fusion",
           "stream_": "stream"}  # fmt: skip


def paths(config: ModelConfig) -> dict[str, object]:
    """{"fusion.heads": 8, …}: every field of a config by its dotted name."""
    found = {}
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{part.name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
        else:
            found[part.name] = value
    return found


def _flat_names() -> dict[str, str]:
    """Flat name → dotted name of every field; complete by construction."""
    names = dict(_FLAT_BY_NAME)
    for path in paths(ModelConfig()):
        if path not in names.values():
            part, _, field_name = path.partition(".")
            prefix = next(prefix for prefix, of in _PREFIX.items() if of == part)
            names[prefix + field_name] = path
    return names


FLAT = _flat_names()


def to_flat(config: ModelConfig) -> dict[str, object]:
    """As config.json has it: the settings of the parts that are built."""
    values = paths(config)
    return {name: values[path] for name, path in FLAT.items() if config.is_built(path.partition(".")[0])}


def from_flat(settings: dict[str, object]) -> ModelConfig:
    """Flat settings → a config; what they do not name has its default. Raises InputError for an unknown name or a value
    that the field cannot have."""
    unknown = sorted(settings.keys() - FLAT.keys())
    if unknown:
        raise InputError(
            f"the model has no setting {quoted(unknown[0])} (a newer version of this repository, or a typing mistake)"
        )
    for name, value in settings.items():  # here, so that the sentence has the name that is in the file
        _checked(FLAT[name], value, name)
    return with_settings(ModelConfig(), {FLAT[name]: value for name, value in settings.items()})


def with_settings(config: ModelConfig, settings: dict[str, object]) -> ModelConfig:
    """A copy with some fields, by dotted name, set to other values. Raises InputError for an unknown name or a value
    that the field cannot have."""
    parts = {part: value for part, value in vars(config).items() if dataclasses.is_dataclass(value)}
    copy = dataclasses.replace(config, **{part: dataclasses.replace(value) for part, value in parts.items()})
    known = paths(copy)
    for path, value in settings.items():
        if path not in known:
            part = path.partition(".")[0]
            near = [name for name in known if name.startswith(f"{part}.")] or list(known)
            raise InputError(f"the model has no setting {path!r}: it has {', '.join(near)}")
        *parts, name = path.split(".")
        setattr(getattr(copy, parts[0]) if parts else copy, name, _checked(path, value, path))
    return copy


def _checked(path: str, value, name: str):
    return checked(name, value, _types(ModelConfig)[path], path.rpartition(".")[2])


def parse_setting(text: str) -> tuple[str, object]:
    """`fusion.heads=4` → ("fusion.heads", 4). Raises InputError for a value of another kind than the field's."""
    path, equals, value = text.partition("=")
    known = _types(ModelConfig)
    if not equals or path not in known:
        raise InputError(f"--set {text}: write PART.FIELD=VALUE, where PART.FIELD is one of {', '.join(known)}")
    kind = known[path]
    if value == "none" and "None" in kind:
        return path, None
    if kind == "bool":
        if value not in ("true", "false"):
            raise InputError(f"--set {text}: {path} is true or false")
        return path, value == "true"
    convert = next(convert for convert in (int, float, str) if convert.__name__ in kind)
    try:
        return path, convert(value)
    except ValueError:
        raise InputError(f"--set {text}: {path} is of type {convert.__name__}") from None


@functools.cache
def _types(config: type) -> dict[str, str]:
    """Dotted name → how the field's type is written."""
    found = {}
    for part in dataclasses.fields(config):
        if dataclasses.is_dataclass(part.type):
            found |= {f"{part.name}.{f.name}": _type_name(f.type) for f in dataclasses.fields(part.type)}
        else:
            found[part.name] = _type_name(part.type)
    return found


def _type_name(kind) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
