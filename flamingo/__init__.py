"""Flamingo: pictures beside text, for a language model that never saw one. Start reading at modeling.py.

Names are imported when they are first used, so that `import flamingo` costs nothing.
"""

import importlib

_WHERE = {
    "PerceiverResampler": "resampler",
    "MaskedCrossAttention": "cross_attention",
    "GatedCrossAttentionBlock": "cross_attention",
    "who_sees_what": "cross_attention",
    "DecoupledEmbedding": "added_tokens",
    "DecoupledLinear": "added_tokens",
    "extend_instance": "language_model",
    "FlamingoLayer": "language_model",
    "FlamingoLMMixin": "language_model",
    "load_vision_encoder": "vision",
    "FlamingoConfig": "config",
    "Flamingo": "modeling",
    "FlamingoOutput": "modeling",
    "FlamingoModel": "huggingface",
    "VisionLanguageModel": "modeling",
    "FlamingoProcessor": "processor",
    "build_flamingo": "build",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
    "import_weights": "peers",
    "open_flamingo_settings": "peers",
    "config_from_flamingo_mini": "peers",
    "rename_flamingo_pytorch": "peers",
    "InputError": "errors",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f"flamingo.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'flamingo' has no attribute {name!r}")
