"""From a config to a live model: load the two frozen backbones, put the trained parts between them."""

import torch

from flamingo.config import FlamingoConfig
from flamingo.errors import InputError
from flamingo.interop.compat import check_versions
from flamingo.modeling import Flamingo
from flamingo.options import resolve
from flamingo.processor import FlamingoProcessor, add_flamingo_tokens
from flamingo.vision import fingerprint, load_vision_encoder


def load_language_model(name: str):
    """A causal language model in float32 and its tokenizer, by Hugging Face id, folder, or `asset:…`.

    Raises InputError when either cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for a file that loads in a second only hides what matters
    try:
        folder_or_id = resolve(name)
        tokenizer = AutoTokenizer.from_pretrained(folder_or_id)
        # The library's default dtype is that of the file: OPT would come as float16.
        lm = AutoModelForCausalLM.from_pretrained(folder_or_id, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load the language model {name}: {reason}") from error
    return lm, tokenizer


def _check(what: str, given: int | None, found: int) -> int:
    if given is not None and given != found:
        raise InputError(f"the config says {what}={given}, but the backbone has {found}: leave {what} out")
    return found


def build_flamingo(config: FlamingoConfig) -> tuple[Flamingo, FlamingoProcessor]:
    """A Flamingo with fresh trained parts (seed torch first), and the processor that belongs to it.

    Fills in the config's dim, dim_visual and fingerprints. Raises InputError when a backbone cannot be loaded, has
    another width than the config says, or other weights than the config's fingerprint; or a library is too old or new.
    """
    check_versions()
    if not config.freeze_vision_model:
        raise InputError("freeze_vision_model must be true: Flamingo's vision encoder is frozen")
    vision_encoder = load_vision_encoder(
        config.clip_model_type, norm=config.vision_feature_norm, class_token=config.vision_class_token
    )
    lm, tokenizer = load_language_model(config.lm)
    config.dim = _check("dim", config.dim, lm.config.hidden_size)
    config.dim_visual = _check("dim_visual", config.dim_visual, vision_encoder.dim)
    for name, found, field in (
        (config.lm, fingerprint(lm), "lm_fingerprint"),
        (config.clip_model_type, vision_encoder.fingerprint, "vision_fingerprint"),
    ):
        expected = getattr(config, field)
        if expected not in (None, found):
            raise InputError(
                f"this model was trained with other weights than {name} has now "
                f"(fingerprint {expected}, found {found}): "
                "point at the weights it was trained with"
            )
        setattr(config, field, found)

    add_flamingo_tokens(tokenizer)
    processor = FlamingoProcessor(tokenizer, vision_encoder.preprocess)
    shape = {
        name: value
        for name, value in config.to_dict().items()
        if name.startswith(("xattn_", "resampler_"))
        or name in ("only_attend_immediate_media", "decoder_layers_attr_name")
    }
    model = Flamingo(
        vision_encoder, lm, dim_visual=config.dim_visual, media_token_id=processor.media_token_id,
        eoc_token_id=processor.eoc_token_id, pad_token_id=processor.pad_token_id, **shape,
    )  # fmt: skip
    if not config.freeze_language_model:
        model.train_language_model(True)
    return model, processor
