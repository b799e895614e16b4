"""Any network of timm as a vision encoder, by name.

What this file teaches: an encoder is a network, its weights, and how pictures are prepared for it, and the three must
belong together. So the weights have to fill the network without a gap, and size, mean and deviation of the pictures are
those that timm notes beside the weights.

    timm:vit_small_patch14_dinov2.lvd142m                  timm's own weights, from the hub
    timm:convnext_tiny:weights.safetensors                 those of a file (.safetensors, or .pth of tensors alone), or
    timm:convnext_tiny:folder                              of the model.safetensors in a folder
    efficientnet-lite2                                     those of a package (packaged.py)

A picture is squashed to the size of the encoder: what a crop cuts off cannot be described.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from flamingo.data.preprocess import Preprocess
from flamingo.errors import InputError
from flamingo.interop import compat, packaged
from flamingo.model.vision import TimmEncoder


def load(name: str, norm: bool, class_token: bool, image_size: int | None) -> TimmEncoder:
    """Raises InputError for an unknown name, weights that are missing or do not fit, or a size it cannot take."""
    import timm

    model_name, _, place = name.removeprefix("timm:").partition(":")
    if name in packaged.VISION_ENCODERS:
        model_name, weights = packaged.TIMM_NAMES[name], packaged.vision_weights(name)
    else:
        weights = _read(place) if place else None
    known = compat.timm_config(model_name)
    if weights is None and not (known and known.has_weights):
        raise InputError(f"timm has no weights for {model_name}: name a file, timm:{model_name}:FILE")
    size = (image_size, image_size) if image_size else tuple(known.input_size[1:])
    tower = timm.create_model(model_name, pretrained=weights is None)
    if weights is not None:
        _fill(tower, weights)
    if image_size and known.fixed_input_size:
        _resize(tower, name, size)
    tower.reset_classifier(0, "")  # what is asked of it are features
    settings = {"size": size, "mean": known.mean, "std": known.std, "interpolation": known.interpolation}
    preprocess = Preprocess(
        {"library": "open_clip", "mode": "RGB", "resize_mode": "squash", "fill_color": 0, **settings}
    )
    return TimmEncoder(tower, name, preprocess, norm, class_token, size)


def _read(place: str) -> dict[str, torch.Tensor]:
    """The tensors of a weight file, or of the one in a folder."""
    file = Path(place).expanduser()
    file = file / "model.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"there is no weight file {file}")
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def _fill(tower: torch.nn.Module, weights: dict[str, torch.Tensor] | list[torch.Tensor]) -> None:
    """Put weights into a network: by name, or a list in the network's order. Raises InputError if they are others."""
    own = tower.state_dict()
    if isinstance(weights, list):
        weights = dict(zip(own, weights, strict=True))
    head = tuple(f"{name}." for name in _names(tower.pretrained_cfg.get("classifier")))
    missing = [name for name in own if name not in weights and not name.startswith(head)]
    foreign = [name for name, value in weights.items() if name not in own or value.shape != own[name].shape]
    foreign = [name for name in foreign if not name.startswith(head)]
    if missing or foreign:
        raise InputError(
            f"the weights are not those of this network: {len(missing)} tensors are missing and {len(foreign)} are not "
            f"its own, such as {(missing + foreign)[0]}"
        )
    tower.load_state_dict({name: value for name, value in weights.items() if not name.startswith(head)}, strict=False)


def _resize(tower: torch.nn.Module, name: str, size: tuple[int, int]) -> None:
    """A network with position embeddings has them for one size: they are interpolated. Raises InputError."""
    try:
        tower.set_input_size(img_size=size)
    except (AttributeError, AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"the vision encoder {name} takes no other size than that of its training") from error


def _names(classifier: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """A network may have one classifier, several or none."""
    return () if not classifier else (classifier,) if isinstance(classifier, str) else tuple(classifier)
