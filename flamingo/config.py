"""What a Flamingo is made of: every number that decides its shape, in one object that becomes `config.json`.

The names and meanings are flamingo-mini's where it has one, so that its users feel at home.
"""

from transformers.configuration_utils import PreTrainedConfig


class FlamingoConfig(PreTrainedConfig):
    """The architecture.

    Fields:
        lm: Hugging Face id or folder of the language model.
        clip_model_type: the vision encoder, in any spelling of `flamingo.vision`.
        dim, dim_visual: D and d; found from the backbones when None, checked against them when given.
        xattn_every, xattn_placement: which decoder layers get a cross-attention (`layers_with_cross_attention`).
        xattn_dim_head, xattn_heads, xattn_ff_mult, xattn_act: the cross-attention blocks.
        resampler_depth, resampler_dim_head, resampler_heads, resampler_ff_mult, resampler_act: the resampler.
        xattn_init_gain, resampler_init_gain, resampler_query_gain, resampler_latents_std: how the trained parts begin.
        resampler_num_latents: n. resampler_num_time_embeds: frames with an embedding of their own, 0 for none.
        resampler_max_num_media: places of a picture in its text with an embedding of their own, 0 for none.
        freeze_language_model, freeze_vision_model: only True is trained by this repository's loop.
        only_attend_immediate_media: a token sees the last picture before it (True), or all pictures before it.
        vision_feature_norm: patch features after the encoder's final norm (True) or before it, as
            open_flamingo and flamingo-mini were trained.
        vision_class_token: the encoder's class token stands before the patches (True: flamingo-mini) or is left out.
        decoder_layers_attr_name: where the language model's layers are, when they cannot be found.
        lm_fingerprint, vision_fingerprint: of the frozen weights this model was trained with; filled in by us.
    """

    model_type = "flamingo"

    lm: str = "facebook/opt-125m"
    clip_model_type: str = "ViT-L-14-quickgelu:openai"
    dim: int | None = None
    dim_visual: int | None = None
    xattn_every: int = 1
    xattn_placement: str = "near"
    xattn_dim_head: int = 64
    xattn_heads: int = 8
    xattn_ff_mult: int = 4
    xattn_act: str = "gelu"
    xattn_init_gain: float = 1.0
    resampler_depth: int = 6
    resampler_dim_head: int = 64
    resampler_heads: int = 8
    resampler_num_latents: int = 64
    resampler_num_time_embeds: int = 4
    resampler_ff_mult: int = 4
    resampler_act: str = "gelu"
    resampler_init_gain: float = 1.0
    resampler_query_gain: float = 1.0
    resampler_latents_std: float = 1.0
    resampler_max_num_media: int = 0
    freeze_language_model: bool = True
    freeze_vision_model: bool = True
    only_attend_immediate_media: bool = True
    vision_feature_norm: bool = True
    vision_class_token: bool = False
    decoder_layers_attr_name: str | None = None
    lm_fingerprint: str | None = None
    vision_fingerprint: str | None = None
