"""The device, and settings of the whole process with which PyTorch is faster on it.

What this file teaches: on a CPU much of a training step is not arithmetic. Freed memory goes back to the kernel, which
clears its pages again; each new matrix shape leaves a plan behind; attention is tuned for texts of thousands of tokens.
"""

import contextlib
import ctypes
import os
import sys

import torch

from flamingo import ranks
from flamingo.errors import InputError


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one; of several processes on a machine each has its own.

    Raises InputError for a device that is not there, or (meta) holds no numbers."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.count() > 1:
        name = _own_gpu()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _own_gpu() -> str:
    """cuda:0 for the first process of a machine, cuda:1 for the second, …"""
    gpus = torch.cuda.device_count()
    if ranks.on_this_machine() > gpus:
        raise InputError(
            f"torchrun started {ranks.on_this_machine()} processes on a machine with {gpus} GPU(s): give "
            f"--nproc-per-node {max(1, gpus)}, or --device cpu"
        )
    torch.cuda.set_device(ranks.local_rank())
    return f"cuda:{ranks.local_rank()}"


def tune(device: torch.device) -> None:
    """Settings of the whole process with which PyTorch is faster on this device."""
    keep_freed_memory()
    keep_few_plans()
    use_tf32()
    use_plain_attention(device)


def keep_freed_memory() -> None:
    """On Linux, let the C library keep freed memory instead of handing each large tensor back to the kernel, which
    must then clear the pages of the next one: about a tenth of a training step on a CPU. Elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 32 << 20)):
            libc.mallopt(parameter, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of <malloc.h>


def use_plain_attention(device: torch.device) -> None:
    """On a CPU, let attention be two products and a softmax. PyTorch's flash attention for CPUs goes through the texts'
    heads one by one: less memory for long texts, but a sixth of a training step on texts of twenty tokens."""
    if device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)  # "cuda" is in the name only
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # bfloat16 stays bfloat16


def give_back_freed_memory() -> None:
    """Now and then, on Linux: between blocks of all sizes that come and go, what is kept falls to pieces and grows."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_few_plans() -> None:
    """oneDNN, which multiplies matrices on CPUs, keeps a plan with its own machine code for each shape it has met, and
    torch keeps 1024 of them beside. Few batches have the same number of words and labels, so a run would gather
    hundreds of megabytes that it never uses again."""
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
        os.environ.setdefault(cache, "64")


def use_tf32() -> None:
    """Let a GPU's float32 products round their factors to 10 bits: several times faster, an error of 1 in 2000."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def peak_memory_bytes(device: torch.device) -> int | None:
    """Of the GPU on a GPU, else of the whole process; None on Windows, where Python does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # not part of Python on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
