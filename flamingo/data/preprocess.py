"""A picture, whatever its mode and size → the tensor an encoder was trained on.

What this file teaches: preprocessing is part of a model. It is therefore saved with it, as plain settings, and made
again from them; no weights are needed for that.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image

from flamingo.data.pictures import open_picture, to_rgb
from flamingo.data.places import Unusable
from flamingo.errors import InputError
from flamingo.interop import compat

FILE = "preprocessor_config.json"
Picture = Image.Image | str | Path | np.ndarray | Tensor  # (H, W, C) or (C, H, W), 0 to 255 or 0 to 1


def is_picture(value) -> bool:
    """One picture, and not a list of them (a batch of arrays is one)."""
    return isinstance(value, (Image.Image, str, Path)) or getattr(value, "ndim", 0) in (2, 3)


def as_pil(picture: Picture) -> Image.Image:
    """Raises InputError for a file that is no picture, or an array that cannot be one."""
    try:
        if isinstance(picture, Image.Image):
            return picture
        if isinstance(picture, (np.ndarray, Tensor)):
            array = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else picture
            if not array.size:
                raise ValueError("it is empty")
            return to_pil_image(array[..., None] if array.ndim == 2 else array)
        if str(picture).startswith(("http://", "https://", "data:")):
            return _load_from_web(str(picture))
        return open_picture(picture)
    except Unusable as error:
        raise InputError(f"{picture} {error}") from error
    except (OSError, ValueError, TypeError) as error:
        what = f"an array of shape {tuple(picture.shape)}" if hasattr(picture, "shape") else picture
        raise InputError(f"{what} cannot be read as a picture ({type(error).__name__}: {error})") from error


def _load_from_web(address: str) -> Image.Image:
    """Raises OSError for all that can go wrong on the way, for which each version of transformers has its own."""
    try:
        return load_image(address)
    except Exception as error:
        raise OSError(str(error)) from error


class Preprocess:
    """PIL pictures → (N, C, H, W), by settings that JSON can hold.

    settings: {"library": "open_clip", …} with the fields of open_clip's PreprocessCfg, or {"library":
    "transformers", …} with those of a CLIPImageProcessor.
    """

    def __init__(self, settings: dict):
        self.settings = settings
        rest = {name: value for name, value in settings.items() if name not in ("library", "processor_class")}
        if settings.get("library") == "open_clip":
            self._apply = compat.open_clip_transform(rest)
        elif settings.get("library") == "transformers":
            from transformers import CLIPImageProcessor

            processor = CLIPImageProcessor.from_dict(rest)
            one = lambda picture: processor(images=picture, return_tensors="pt").pixel_values[0]  # noqa: E731
            self._apply = lambda pictures: torch.stack([one(picture) for picture in pictures])
        else:
            raise InputError(f"preprocessing of an unknown library: {settings.get('library')!r}")

    def __call__(self, picture: Image.Image) -> Tensor:
        """(C, H, W)"""
        return self.all([picture])[0]

    def all(self, pictures: Iterable[Image.Image]) -> Tensor:
        """(N, C, H, W): the same for each as alone, sooner."""
        return self._apply(map(to_rgb, pictures))  # one after the other is in memory in its own size

    def __repr__(self) -> str:
        return f"Preprocess({self.settings})"

    def __reduce__(self):
        """For pickle: workers of a DataLoader that are spawned make it again from its settings."""
        return Preprocess, (self.settings,)

    @classmethod
    def load(cls, folder: Path) -> "Preprocess":
        try:
            return cls(json.loads((folder / FILE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise InputError(f"{folder} does not say how pictures are prepared: it has no {FILE}") from None
        except (ValueError, TypeError) as error:
            raise InputError(f"{folder / FILE} is damaged: {error}") from None

    def save(self, folder: Path) -> None:
        settings = self.settings | {"processor_class": "FlamingoProcessor"}  # for AutoProcessor
        (folder / FILE).write_text(json.dumps(settings, indent=2) + "\n")
