"""Flamingo: pictures beside text, for a language model that never saw one. Start reading at flamingo/model/vlm.py.

Names are imported when they are first used, so that `import flamingo` costs nothing.
"""

import importlib

_WHERE = {
    "Flamingo": "model.vlm",
    "VisionLanguageModel": "model.vlm",
    "PerceiverResampler": "model.resampler",
    "MaskedCrossAttention": "model.cross_attention",
    "GatedCrossAttentionBlock": "model.cross_attention",
    "media_attention_mask": "model.cross_attention",
    "FlamingoLayer": "model.language_model",
    "FlamingoLMMixin": "model.language_model",
    "extend_instance": "model.language_model",
    "DecoupledEmbedding": "model.added_tokens",
    "DecoupledLinear": "model.added_tokens",
    "ModelConfig": "config",
    "FlamingoProcessor": "data.processor",
    "load_vision_encoder": "interop.backbones",
    "build_flamingo": "interop.backbones",
    "load_model": "training.checkpoint",
    "save_model": "training.checkpoint",
    "FlamingoConfig": "interop.huggingface",
    "FlamingoModel": "interop.huggingface",
    "import_weights": "interop.peers",
    "open_flamingo_settings": "interop.peers",
    "open_flamingo_modeling_settings": "interop.peers",
    "config_from_flamingo_mini": "interop.peers",
    "rename_flamingo_pytorch": "interop.peers",
    "VLM": "model.build",
    "VLMWithCrossAttention": "model.build",
    "VLMWithLanguageStream": "model.build",
    "QFormer": "model.qformer",
    "LinearProjection": "model.linear",
    "lay_stream": "model.language_stream",
    "PaLMConfig": "model.palm",
    "PaLMForCausalLM": "model.palm",
    "FlamingoPaLM": "interop.flamingo_pytorch",
    "InputError": "errors",
}
__all__ = list(_WHERE)


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f"flamingo.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'flamingo' has no attribute {name!r}")
