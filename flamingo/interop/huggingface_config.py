"""FlamingoConfig: `ModelConfig` as transformers wants a config, one flat object, with flamingo-mini's names.

Its fields are made of the table in flamingo/config.py, so that none is written twice.
"""

import dataclasses
import functools

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from flamingo.config import ModelConfig
from flamingo.files import resolve
from flamingo.settings import FLAT, from_flat, paths, to_flat


def _field_types() -> dict[str, type]:
    """Flat name → type."""
    parts = {part.name: part for part in dataclasses.fields(ModelConfig)}
    types = {}
    for name, path in FLAT.items():
        part, _, field = path.partition(".")
        inner = {f.name: f.type for f in dataclasses.fields(parts[part].type)} if field else {}
        types[name] = inner[field] if field else parts[part].type
    return types


def _model_config(self) -> ModelConfig:
    """The same settings, part by part."""
    return from_flat({name: getattr(self, name) for name in FLAT})


def _of_model_config(cls, config: ModelConfig) -> "FlamingoConfig":
    return cls(**to_flat(config))


def _text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
    """The language model's config, where transformers looks for the size of the vocabulary and of the hidden states."""
    try:
        return _config_of_language_model(self.lm)
    except OSError:  # a config without its language model at hand
        return self


@functools.cache
def _config_of_language_model(name: str) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(resolve(name))


_DEFAULTS = paths(ModelConfig())
FlamingoConfig = type(
    "FlamingoConfig",
    (PreTrainedConfig,),
    {
        "__module__": __name__,
        "__doc__": "The architecture, flat. What each field means: flamingo/config.py.",
        "__annotations__": _field_types() | {"use_cache": bool, "pad_token_id": int | None, "eos_token_id": int | None},
        **{name: _DEFAULTS[path] for name, path in FLAT.items()},
        "use_cache": True,  # and the ids of the tokenizer, which the model fills in
        "pad_token_id": None,
        "eos_token_id": None,
        "get_text_config": _text_config,
        "model_type": "flamingo",
        "model_config": _model_config,
        "of_model_config": classmethod(_of_model_config),
    },
)
