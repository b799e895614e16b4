"""FlamingoConfig: `ModelConfig` as transformers wants a config, one flat object, with flamingo-mini's names.

Its fields are made of the table in flamingo/config.py, so that none is written twice.
"""

import dataclasses

from transformers.configuration_utils import PreTrainedConfig

from flamingo.config import FLAT, ModelConfig, from_flat, paths, to_flat


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


_DEFAULTS = paths(ModelConfig())
FlamingoConfig = type(
    "FlamingoConfig",
    (PreTrainedConfig,),
    {
        "__module__": __name__,
        "__doc__": "The architecture, flat. What each field means: flamingo/config.py.",
        "__annotations__": _field_types(),
        **{name: _DEFAULTS[path] for name, path in FLAT.items()},
        "model_type": "flamingo",
        "model_config": _model_config,
        "of_model_config": classmethod(_of_model_config),
    },
)
