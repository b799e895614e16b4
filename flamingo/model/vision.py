"""Any frozen picture encoder, as one thing: pixels in, patch features out.

What this file teaches: CLIP is trained to give one vector a picture, but Flamingo wants more: the tokens of the
patches, which still know where things are. They are read here off the last layer, without the class token (unless
asked for: flamingo-mini was trained with it, first of the v).

    (N, C, H, W) pixels  →  (N, v, d) features          v patches, d wide

A convolutional network has no patches, but its last features are a grid, and each place of it serves as one.
Which encoders there are, and how they are loaded by name, is in interop/backbones.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flamingo.errors import InputError
from flamingo.files import fingerprint
from flamingo.interop import compat


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


class VisionEncoder(nn.Module):
    """A frozen encoder. Subclasses say how features are read off their kind of tower.

    Attributes:
        name: by which it was loaded.   dim: d.   image_size: (H, W) in pixels.   fingerprint: of its weights.
        preprocess: a PIL picture → (C, H, W) tensor, as the encoder was trained.
    """

    def __init__(
        self,
        tower: nn.Module,
        name: str,
        preprocess: Callable,
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

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, C, H, W) → (N, v, d), with a gradient only if somebody has let the tower train."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(self)):
            features = self.patch_features(pixel_values)
        if features.ndim != 3:
            raise RuntimeError(f"{self.name} gave features of shape {tuple(features.shape)}, not (N, v, d)")
        return features

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        raise NotImplementedError


class OpenClipEncoder(VisionEncoder):
    """An open_clip tower, built-in or timm."""

    def __init__(self, tower: nn.Module, name: str, preprocess: Callable, norm: bool = True, class_token: bool = False):
        super().__init__(tower, name, preprocess, norm, class_token)
        if class_token and not compat.has_class_token(tower):
            raise InputError(f"the vision encoder {name} has no class token: set vision_class_token to false")
        size = tower.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        with torch.no_grad():  # timm towers have no attribute for it: try a blank picture
            self.dim = self.patch_features(torch.zeros(1, 3, *self.image_size)).shape[-1]

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        return compat.open_clip_patches(self.tower, pixel_values, norm=self.norm, class_token=self.class_token)


class TimmEncoder(VisionEncoder):
    """A network of timm: a transformer, whose patches are its tokens, or a convolutional one, whose patches are the
    places of its grid.

    image_size: (H, W). Raises InputError if it cannot take pictures of that size, or for a class token or features
    before a final norm where there are none.
    """

    def __init__(
        self, tower: nn.Module, name: str, preprocess: Callable, norm: bool, class_token: bool,
        image_size: tuple[int, int],
    ):  # fmt: skip
        super().__init__(tower, name, preprocess, norm, class_token)
        self.image_size = image_size
        if class_token and not compat.has_class_token(tower):
            raise InputError(f"the vision encoder {name} has no class token: set vision_class_token to false")
        if not norm and not hasattr(tower, "num_prefix_tokens"):
            raise InputError(f"the vision encoder {name} has no final norm: set vision_feature_norm to true")
        try:
            with torch.no_grad():
                self.dim = self.patch_features(torch.zeros(1, 3, *image_size)).shape[-1]
        except (AssertionError, RuntimeError, ValueError) as error:  # each family of networks says it in its own way
            size = " x ".join(map(str, image_size))
            raise InputError(f"the vision encoder {name} cannot take pictures of {size} pixels: {error}") from error

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        return compat.timm_patches(self.tower, pixel_values, norm=self.norm, class_token=self.class_token)


class HuggingFaceClipEncoder(VisionEncoder):
    """The vision half of a Hugging Face CLIP."""

    def __init__(self, tower: nn.Module, name: str, preprocess: Callable, norm: bool = True, class_token: bool = False):
        super().__init__(tower, name, preprocess, norm, class_token)
        self.image_size = (tower.config.image_size, tower.config.image_size)
        self.dim = tower.config.hidden_size

    def patch_features(self, pixel_values: Tensor) -> Tensor:
        return compat.hugging_face_patches(self.tower, pixel_values, norm=self.norm, class_token=self.class_token)
