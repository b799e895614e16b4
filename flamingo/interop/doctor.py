"""`python -m flamingo doctor`: what a bug report needs. Versions, hardware, and whether they work together."""

import os
import platform

import torch

from flamingo.classroom.examples import ClassroomScenes
from flamingo.data.batches import Collate
from flamingo.fast.device import pick_device, tune
from flamingo.fast.enable import enable
from flamingo.fast.precision import bf16_is_faster
from flamingo.files import asset
from flamingo.interop import compat
from flamingo.interop.selfcheck import check_decoding
from flamingo.training.checkpoint import load_model

ALSO = ("torchvision", "timm", "tokenizers", "huggingface_hub", "safetensors", "einops", "numpy", "pillow")


def doctor() -> None:
    """Print it all. Raises InputError when something does not work."""
    device = pick_device("auto")
    rows = [("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    rows += [
        (package, f"{compat.installed(package)} (works: {compat.range_of(package)})") for package in compat.WORKING
    ]
    rows += [(package, compat.installed(package)) for package in ALSO]
    rows += [("device", _describe(device))]
    for name, text in rows:
        print(f"{name:18}{text}")
    compat.check_versions()
    tune(device)
    model, processor, _ = load_model(asset("classroom/flamingo"))
    model.to(device)
    fast = enable(model)
    batch = Collate(processor, 128, layout=True)([ClassroomScenes("validation")[i] for i in range(16)])
    dtype = "bfloat16" if bf16_is_faster(model.train(), batch.to(device).inputs(), device) else "float32"
    print(f"{'dtype auto':18}{dtype}")
    if device.type == "cpu" and (warning := compat.without_onednn_warning()):
        print(f"{'oneDNN':18}{warning}")
    print(f"{'flamingo/fast':18}{', '.join(fast)}")
    difference = check_decoding(model)
    print(f"{'self-check':18}passed: cached steps and forward pass are {difference:.1e} apart")


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    memory = ""
    if hasattr(os, "sysconf"):  # not on Windows
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return f"CPU, {os.cpu_count()} cores{memory}"
