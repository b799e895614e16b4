"""From a config and two live backbones to a model: the table of parts."""

from torch import nn
from transformers import GenerationConfig

from flamingo.config import ModelConfig
from flamingo.errors import InputError
from flamingo.model.language_model import extend_instance
from flamingo.model.resampler import PerceiverResampler
from flamingo.model.standardize import StandardizeMixin
from flamingo.model.vlm import Flamingo, SpecialTokens, VisionLanguageModel

TOKENIZERS = {"perceiver": PerceiverResampler}  # of `tokenizer_type`: (N, F, v, d) → (N, n, d)
FUSIONS = {"cross-attention": Flamingo}  # of `fusion_type`


def build_from_parts(
    config: ModelConfig, vision_encoder: nn.Module, lang_encoder: nn.Module, tokens: SpecialTokens, dim_visual: int
) -> VisionLanguageModel:
    """A model with fresh trained parts (seed torch first) around two frozen backbones.

    vision_encoder: (N, C, H, W) → (N, v, d). lang_encoder: a Hugging Face causal language model, extended in place.
    dim_visual: d. Raises InputError for an unknown part, or an encoder that is to be trained.
    """
    if not config.vision.freeze:
        raise InputError("vision.freeze must be true: the vision encoder is frozen")
    tokenizer_class = _named("tokenizer_type", config.tokenizer_type, TOKENIZERS)
    model_class = _named("fusion_type", config.fusion_type, FUSIONS)
    tokenizer = tokenizer_class(dim=dim_visual, **vars(config.tokenizer))
    if config.tokenizer.standardize:
        extend_instance(tokenizer, StandardizeMixin)
        tokenizer.init_standardize()
    model = model_class(vision_encoder, tokenizer, lang_encoder, tokens, config)
    lang_encoder.generation_config = generation_config(tokens)
    if not config.language.freeze:
        model.train_language_model(True)
    return model


def generation_config(tokens: SpecialTokens) -> GenerationConfig:
    """How a text is continued unless `generate` is told otherwise: the likeliest token each time, until <|endofchunk|>;
    <image> and padding are never generated."""
    return GenerationConfig(
        do_sample=False, eos_token_id=tokens.eoc, pad_token_id=tokens.pad,
        suppress_tokens=sorted({tokens.image, tokens.pad}),
    )  # fmt: skip


def _named(setting: str, name: str, table: dict):
    if name not in table:
        raise InputError(f"unknown {setting} {name!r}: choose one of {', '.join(table)}")
    return table[name]
