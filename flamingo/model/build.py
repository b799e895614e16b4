"""From a config and two live backbones to a model: the table of parts."""

from torch import nn
from transformers import GenerationConfig

from flamingo.config import PART_OF, ModelConfig
from flamingo.errors import InputError
from flamingo.interop import compat
from flamingo.model.language_stream import LanguageStreamModel, ProjectedResampler
from flamingo.model.linear import LinearProjection, begin_as_large_as
from flamingo.model.qformer import QFormer
from flamingo.model.resampler import PerceiverResampler
from flamingo.model.vlm import Flamingo, SpecialTokens, VisionLanguageModel

TOKENIZERS = {"perceiver": PerceiverResampler, "qformer": QFormer, "linear": LinearProjection}  # of `tokenizer_type`
FUSIONS = {"cross-attention": Flamingo, "language-stream": LanguageStreamModel}  # of `fusion_type`

# open_flamingo's names for the three.
VLM, VLMWithCrossAttention, VLMWithLanguageStream = VisionLanguageModel, Flamingo, LanguageStreamModel


def build_from_parts(
    config: ModelConfig, vision_encoder: nn.Module, lang_encoder: nn.Module, tokens: SpecialTokens, dim_visual: int
) -> VisionLanguageModel:
    """A model with fresh trained parts (seed torch first) around two frozen backbones.

    vision_encoder: (N, C, H, W) → (N, v, d). lang_encoder: a Hugging Face causal language model, extended in place.
    dim_visual: d. Raises InputError for an unknown part, or an encoder that is to be trained.
    """
    if not config.vision.freeze:
        raise InputError("vision.freeze must be true: the vision encoder is frozen")
    model_class = _named("fusion_type", config.fusion_type, FUSIONS)
    tokenizer = make_vision_tokenizer(config, dim_visual, lang_encoder.get_input_embeddings())
    model = model_class(vision_encoder, tokenizer, lang_encoder, tokens, config)
    lang_encoder.generation_config = generation_config(tokens)
    if not config.language.freeze:
        model.train_language_model(True)
    return model


def make_vision_tokenizer(config: ModelConfig, dim_visual: int, embeddings: nn.Embedding) -> nn.Module:
    """(N, F, v, d) → (N, n, d'). Where its latents stand among token embeddings they are as wide as these, and begin as
    large; beside the text, cross-attention takes them in any width.

    embeddings: the language model's. Raises InputError for an unknown tokenizer, or settings it cannot have.
    """
    tokenizer_class = _named("tokenizer_type", config.tokenizer_type, TOKENIZERS)
    part = next(part for part, built in PART_OF.items() if built == ("tokenizer_type", config.tokenizer_type))
    settings = vars(getattr(config, part))
    if config.fusion_type != "language-stream":
        return tokenizer_class(dim=dim_visual, **settings)
    tokenizer_class = ProjectedResampler if tokenizer_class is PerceiverResampler else tokenizer_class
    tokenizer = tokenizer_class(dim=dim_visual, dim_out=embeddings.embedding_dim, **settings)
    scale = compat.embedding_scale(embeddings)
    begin_as_large_as(tokenizer.projection, scale * embeddings.weight.detach().float().std().item())
    return tokenizer


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
