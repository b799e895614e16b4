"""Of open_clip, timm and transformers' CLIP: patch tokens and grids of features of their towers, a vision tower without
its text tower, what their weights were trained on, QuickGELU, their pictures' settings."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flamingo.errors import InputError
from flamingo.interop.compat.versions import unlike


def open_clip_patches(tower: nn.Module, pixel_values: Tensor, *, norm: bool, class_token: bool) -> Tensor:
    """(N, C, H, W) → the patch tokens of the last layer (N, v, d), the class token first if asked for.

    `visual(x)[1]` would silently be the second picture of timm's towers.
    """
    if hasattr(tower, "trunk"):
        return timm_patches(tower.trunk, pixel_values, norm=norm, class_token=class_token)
    if not hasattr(tower, "forward_intermediates"):
        raise unlike("open_clip_torch", f"has a tower {type(tower).__name__} without forward_intermediates")
    result = tower.forward_intermediates(
        pixel_values, indices=1, normalize_intermediates=norm, intermediates_only=True, output_fmt="NLC",
        output_extra_tokens=class_token,
    )  # fmt: skip
    features = result["image_intermediates"][-1]
    if class_token:
        features = torch.cat([result["image_intermediates_prefix"][-1][:, :1], features], dim=1)
    return features


def timm_patches(tower: nn.Module, pixel_values: Tensor, *, norm: bool, class_token: bool) -> Tensor:
    """(N, C, H, W) → the last features (N, v, d): of a transformer its patch tokens, the class token first if asked
    for; of a convolutional network the places of its grid, row by row. (Its last *stage*, which forward_intermediates
    gives, is not always its last features: EfficientNet widens them once more.)"""
    features = tower.forward_features(pixel_values)
    if features.ndim == 4:
        if features.shape[1] != tower.num_features:  # (N, H', W', d), as Swin has it
            features = features.permute(0, 3, 1, 2)
        return features.flatten(2).transpose(1, 2)
    prefix = tower.num_prefix_tokens
    if not norm:
        found = tower.forward_intermediates(
            pixel_values, indices=1, norm=False, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )[-1]
        features = torch.cat([found[1], found[0]], dim=1) if isinstance(found, tuple) else found
    patches = features[:, prefix:]
    return torch.cat([features[:, :1], patches], dim=1) if class_token else patches


def timm_config(name: str):
    """What timm knows of the weights of a name (input_size, mean, std, has_weights, …). Raises InputError."""
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(name):
        raise InputError(f"timm has no model named {name!r}: see timm.list_models()")
    return get_pretrained_cfg(name)


def open_clip_image_and_patches(tower: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) → the embedding of each picture (N, E) and its patch tokens after the final norm (N, v, d)."""
    result = tower.forward_intermediates(pixel_values, indices=1, normalize_intermediates=True, output_fmt="NLC")
    return result["image_features"], result["image_intermediates"][0]


# Beside a vision tower in an open_clip model: the smallest text tower of open_clip's own. No weights are meant for it.
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


def has_text_of_transformers(name: str) -> bool:
    """Is the text tower of an open_clip model (hf-hub:…, local-dir:…) a model of transformers?"""
    import open_clip

    return bool(open_clip.get_model_config(name)["text_cfg"].get("hf_model_name"))


def open_clip_without_text(name: str) -> nn.Module:
    """The open_clip model of a name (hf-hub:…, local-dir:…) with the weights of its vision tower alone.

    For a text tower of transformers open_clip would ask the hub for the config of yet another model, to build what is
    thrown away. Raises InputError if the weight file lacks tensors of the vision tower or has others.
    """
    import open_clip
    from open_clip import factory, pretrained

    clip = open_clip.create_model(
        name, precision="fp32", load_weights=False, pretrained_text=False, text_cfg=NO_TEXT, init_logit_bias=None
    )
    on_hub, place = name.startswith("hf-hub:"), name.partition(":")[2]
    look_up = getattr(pretrained, "download_pretrained_from_hf", None) if on_hub else (
        getattr(factory, "_find_checkpoint_in_dir", None))  # fmt: skip
    if look_up is None:
        raise unlike("open_clip_torch", "finds weight files in another way")
    file = look_up(place if on_hub else Path(place))
    if file is None:
        raise InputError(f"{place} holds no weight file, such as open_clip_model.safetensors")
    found = open_clip.load_checkpoint(clip, file, strict=False)  # not strict: of the text
    wrong = [[key for key in keys if key.startswith("visual.")] for keys in (found.missing_keys, found.unexpected_keys)]
    if any(wrong):
        raise InputError(
            f"{Path(file).name} has not the weights of its vision tower: {len(wrong[0])} tensors are missing and "
            f"{len(wrong[1])} are not its own, such as {(wrong[0] + wrong[1])[0]}"
        )
    return clip


def has_class_token(tower: nn.Module) -> bool:
    trunk = getattr(tower, "trunk", tower)  # timm's tower inside open_clip's
    return getattr(trunk, "cls_token", getattr(trunk, "class_embedding", None)) is not None


def trained_with_quick_gelu(model_name: str, pretrained: str) -> tuple[bool, bool]:
    """(the weights were trained with QuickGELU, the model computes it). open_clip only warns where they differ."""
    import open_clip

    weights = (open_clip.get_pretrained_cfg(model_name, pretrained) or {}).get("quick_gelu", False)
    return weights, open_clip.get_model_config(model_name).get("quick_gelu", False)


def open_clip_transform(settings: dict) -> Callable[[Iterable[Image.Image]], Tensor]:
    """RGB pictures → (N, C, H, W), by the fields of open_clip's PreprocessCfg. What is arithmetic alone is done for all
    pictures at once: at a few thousand pixels each a call costs more than the numbers."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Normalize

    *steps, _, normalize = image_transform_v2(PreprocessCfg(**settings), is_train=False).transforms
    if not isinstance(normalize, Normalize):
        raise unlike("open_clip_torch", f"ends the preparation of a picture with {type(normalize).__name__}")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (normalize.mean, normalize.std))

    def sized(picture: Image.Image) -> np.ndarray:
        for step in steps:
            picture = step(picture)
        return np.asarray(picture)

    def transform(pictures: Iterable[Image.Image]) -> Tensor:
        bytes_ = torch.from_numpy(np.stack([sized(picture) for picture in pictures])).permute(0, 3, 1, 2)
        shares = bytes_.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return shares.sub_(mean).div_(std)

    return transform


# ---------------------------------------------------------------------------- transformers: its CLIP's vision half
def hugging_face_patches(tower: nn.Module, pixel_values: Tensor, *, norm: bool, class_token: bool) -> Tensor:
    """(N, C, H, W) → the tokens of the last layer (N, v, d), without the class token unless asked for."""
    tokens = tower(pixel_values=pixel_values).last_hidden_state  # (N, 1 + v, d), before the final norm
    tokens = tokens if class_token else tokens[:, 1:]
    inner = getattr(tower, "vision_model", tower)  # where the norm is has changed once
    if not hasattr(inner, "post_layernorm"):
        raise unlike("transformers", f"has a {type(tower).__name__} without post_layernorm")
    return inner.post_layernorm(tokens) if norm else tokens
