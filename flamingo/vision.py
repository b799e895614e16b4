"""Any frozen picture encoder, as one thing: pixels in, patch features out.

What this file teaches: CLIP is trained to give one vector a picture, but Flamingo wants more: the tokens of the
patches, which still know where things are. They are read here off the last layer, without the class token (unless
asked for: flamingo-mini was trained with it, first of the v).

    (N, C, H, W) pixels  →  (N, v, d) features          v patches, d wide

Names: `ViT-L-14-quickgelu:openai` (open_clip name : pretrained tag), `hf-hub:…` and `local-dir:…` (open_clip; the
towers may be open_clip's own or timm's), or a Hugging Face CLIP id or folder (`openai/clip-vit-base-patch32`).
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from flamingo.errors import InputError
from flamingo.interop import compat
from flamingo.options import resolve
from flamingo.preprocess import Preprocess

PIXELS_AT_ONCE = 16 * 224 * 224  # that a CPU encodes together


def fingerprint(module: nn.Module) -> str:
    """16 hex digits that tell one set of weights from another: a hash of names, shapes and 64 values per tensor."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().flatten()
        count = min(64, len(flat))
        # In whole numbers: float32 cannot count the 39 million values of OPT-125m's word vectors.
        picked = flat[torch.arange(count, device=flat.device) * (len(flat) - 1) // max(1, count - 1)]
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(picked.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class VisionEncoder(nn.Module):
    """A frozen encoder. Subclasses say how features are read off their kind of tower.

    Attributes:
        name: how it was asked for.   dim: d.   image_size: (H, W) in pixels.
        preprocess: a PIL picture → (C, H, W) tensor, as the encoder was trained.
    """

    def __init__(
        self,
        tower: nn.Module,
        name: str,
        preprocess: Preprocess,
        norm: bool = True,
        class_token: bool = False,
    ):
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.name, self.preprocess, self.norm, self.class_token = name, preprocess, norm, class_token
        self.fingerprint = fingerprint(tower)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Frozen means frozen: the tower stays in eval mode, whatever the model around it does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, C, H, W) → (N, v, d)."""
        count, (height, width) = len(pixel_values), pixel_values.shape[-2:]
        if pixel_values.device.type == "cpu":  # what a layer hands to the next one then fits its cache
            count = max(1, PIXELS_AT_ONCE // (height * width))
        features = torch.cat([self.patch_features(some) for some in pixel_values.split(count)])
        if features.ndim != 3:
            raise RuntimeError(f"{self.name} gave features of shape {tuple(features.shape)}, not (N, v, d)")
        return features

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        raise NotImplementedError


class OpenClipEncoder(VisionEncoder):
    """An open_clip tower, built-in or timm."""

    def __init__(
        self, tower: nn.Module, name: str, preprocess: Preprocess, norm: bool = True, class_token: bool = False
    ):
        super().__init__(tower, name, preprocess, norm, class_token)
        if class_token and not compat.has_class_token(tower):
            raise InputError(f"the vision encoder {name} has no class token: set vision_class_token to false")
        size = tower.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        with torch.no_grad():  # timm towers do not tell their width: ask with a blank picture
            self.dim = self.patch_features(torch.zeros(1, 3, *self.image_size)).shape[-1]

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        return compat.open_clip_patches(self.tower, pixel_values, norm=self.norm, class_token=self.class_token)


class HuggingFaceClipEncoder(VisionEncoder):
    """The vision half of a Hugging Face CLIP."""

    def __init__(
        self, tower: nn.Module, name: str, preprocess: Preprocess, norm: bool = True, class_token: bool = False
    ):
        super().__init__(tower, name, preprocess, norm, class_token)
        self.image_size = (tower.config.image_size, tower.config.image_size)
        self.dim = tower.config.hidden_size

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        return compat.hugging_face_patches(self.tower, pixel_values, norm=self.norm, class_token=self.class_token)


def _quick_gelu_must_match(model_name: str, pretrained: str) -> None:
    """open_clip only warns when weights trained with QuickGELU meet a model without it; the features are wrong then."""
    trained_with, computes = compat.trained_with_quick_gelu(model_name, pretrained)
    if trained_with != computes:
        other = f"{model_name}-quickgelu" if trained_with else model_name.removesuffix("-quickgelu")
        what = "with" if trained_with else "without"
        raise InputError(f"the weights {pretrained} were trained {what} QuickGELU: ask for {other}:{pretrained}")


def _load_open_clip(name: str, norm: bool, class_token: bool) -> VisionEncoder:
    import open_clip

    folder = Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None
    if folder and not (folder / "open_clip_config.json").is_file():
        raise InputError(f"{folder} is no open_clip folder: it has no open_clip_config.json")
    model_name, pretrained = name, None
    if not name.startswith(("hf-hub:", "local-dir:")):
        model_name, _, pretrained = name.partition(":")
        known = open_clip.list_pretrained_tags_by_model(model_name)
        if model_name not in open_clip.list_models():
            raise InputError(f"open_clip has no model named {model_name!r}: see open_clip.list_models()")
        if pretrained not in known and not Path(pretrained).is_file():
            raise InputError(
                f"{model_name} has no weights {pretrained!r}: choose one of {', '.join(known) or '(none)'}"
            )
        _quick_gelu_must_match(model_name, pretrained)
    try:
        with compat.quiet_open_clip():
            clip = open_clip.create_model(model_name, pretrained=pretrained, precision="fp32", require_pretrained=True)
    except json.JSONDecodeError as error:
        raise InputError(f"the config of {name} is not JSON: {error}") from error
    except Exception as error:  # missing weights, no network, a wrong file: open_clip has no exception of its own
        raise InputError(f"cannot load the vision encoder {name}: {_first_line(error)}") from error
    preprocess = Preprocess({"library": "open_clip", **open_clip.get_model_preprocess_cfg(clip)})
    return OpenClipEncoder(clip.visual, name, preprocess, norm, class_token)  # the text tower is dropped


def _load_hugging_face_clip(name: str, norm: bool, class_token: bool) -> VisionEncoder:
    from transformers import CLIPImageProcessor, CLIPVisionModel

    try:
        tower = CLIPVisionModel.from_pretrained(name, dtype=torch.float32)
        processor = CLIPImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the vision encoder {name}: {_first_line(error)}") from error

    preprocess = Preprocess({"library": "transformers", **json.loads(processor.to_json_string())})
    return HuggingFaceClipEncoder(tower, name, preprocess, norm, class_token)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_vision_encoder(name: str, *, norm: bool = True, class_token: bool = False) -> VisionEncoder:
    """Load a frozen encoder by name (see the top of this file).

    norm: features after the tower's final norm; False reproduces what open_flamingo and flamingo-mini were trained
    on (the option `vision_feature_norm`).
    class_token: keep the class token, as the first of the v, as flamingo-mini does (the option `vision_class_token`).

    Raises InputError when the name is unknown, the weights are missing, QuickGELU does not match, or a class token is
    asked of a tower that has none.
    """
    if name.startswith("asset:"):
        return _load_open_clip(f"local-dir:{resolve(name)}", norm, class_token)
    if name.startswith(("hf-hub:", "local-dir:")) or (":" in name and "/" not in name.partition(":")[0]):
        return _load_open_clip(name, norm, class_token)
    if "/" not in name and not Path(name).is_dir():
        raise InputError(
            f"cannot tell what vision encoder {name!r} is: write NAME:PRETRAINED for open_clip "
            "(ViT-L-14-quickgelu:openai), hf-hub:…, local-dir:…, or a Hugging Face CLIP id or folder"
        )
    return _load_hugging_face_clip(name, norm, class_token)
