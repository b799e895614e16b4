"""The parts of training that are worth a name of their own; the loop itself is in train.py, in the open."""

import contextlib
import copy
import ctypes
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from flamingo.data.batches import Batch
from flamingo.errors import InputError
from flamingo.modeling import Flamingo
from flamingo.onednn import pack_matrices
from flamingo.options import TrainingOptions


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one. Raises InputError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


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
    """oneDNN, which multiplies matrices on CPUs, keeps a plan and its memory for each shape it has met, 1024 of them.
    Few batches have the same number of words and labels, so a run would gather gigabytes that it never uses again."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")  # read at the first product


def bf16_pays(model: Flamingo, batch: Batch, device: torch.device) -> bool:
    """Is bfloat16 autocast faster here? Always on GPUs that have it; on a CPU a few texts, trained both ways, decide.

    Many CPUs have no bfloat16 unit and convert back and forth; on others the products are faster and the backward pass,
    or all the converting between, is slower: a matrix product alone would not tell. Tried on a copy: what is frozen is
    then held in bfloat16, as it will be.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    few, tried = batch.first(32), copy.deepcopy(model)

    def seconds(dtype: str) -> float:
        best = math.inf
        for _ in range(3):
            began = time.perf_counter()
            with autocast(device, dtype):
                loss = tried(**few.inputs()).loss
            loss.backward()
            best = min(best, time.perf_counter() - began)
        return best

    exact = seconds("float32")
    hold_frozen_in_bf16(tried)
    return seconds("bfloat16") < 0.9 * exact


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """The arithmetic of forward passes; a fresh context for each use. Weights that train stay in float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def use_tf32() -> None:
    """Let a GPU's float32 products round their factors to 10 bits: several times faster, an error of 1 in 2000."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def hold_frozen_in_bf16(model: Flamingo, *, trained: bool = False) -> None:
    """Convert what is frozen to bfloat16, once: half the memory, and autocast has nothing to convert at every product.

    The vision encoder as a whole, and the language model's matrices; converting these changes no bit of what autocast
    computes. trained: those that train as well, for a model that only generates from now on; an optimizer needs
    them in float32.
    """
    model.vision_encoder.to(torch.bfloat16)
    pack_matrices(model.vision_encoder)
    for module in list(model.modules()):
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(module, nn.Embedding)
        if is_matrix and (trained or not weight.requires_grad):
            # A new parameter, for the head's matrix may also be the word vectors, which nothing converts.
            module.weight = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=weight.requires_grad)


def compile_trained_parts(model: Flamingo, backend: str = "inductor") -> None:
    """torch.compile, in place and for any length of text, of the resampler and the cross-attention: the language
    model's layers are told apart by a number, and each would be compiled anew. Raises InputError without a compiler.
    """
    if not torch.cuda.is_available() and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise InputError("--compile needs a C++ compiler, and none was found: install one, or leave --compile out")
    model.perceiver.compile(dynamic=True, backend=backend)
    for layer in model.lang_encoder._get_decoder_layers():
        layer.gated_cross_attn_layer.compile(dynamic=True, backend=backend)


def checkpoint_layers(model: Flamingo) -> None:
    """Gradient checkpointing of every decoder layer with its cross-attention."""
    for layer in model.lang_encoder._get_decoder_layers():
        layer.gradient_checkpointing = True


def make_optimizer(model: Flamingo, options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW over what trains and nothing else, in three groups.

    Only matrices decay: pulling gates, norms, latents or embeddings towards 0 would mean something. The gates learn
    much faster than the rest: tanh(0) = 0 lets through neither signal nor gradient, so until they open nothing else
    in the block is told anything, and at the common rate they hardly open.
    """
    gates, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("_gate"):
            gates.append(parameter)
        elif parameter.ndim >= 2 and not any(part in name for part in ("additional", "latents", "_embs")):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": matrices, "lr": options.lr, "weight_decay": options.weight_decay},
        {"params": rest, "lr": options.lr, "weight_decay": 0.0},
        {"params": gates, "lr": options.gate_lr, "weight_decay": 0.0},
    ]
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Factor of the learning rate: linear warmup, then half a cosine down to a hundredth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, options: TrainingOptions) -> None:
    """Give each group its peak rate times `warmup_cosine`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * warmup_cosine(step, options.steps, options.warmup_steps)


@torch.no_grad()
def validate(model: Flamingo, batches: Sequence[Batch], device: torch.device, dtype: str) -> dict[str, float]:
    """Loss per target token with the pictures and without them. A model that does not look has both the same."""
    model.eval()
    totals, targets = {"val_loss": 0.0, "val_loss_blind": 0.0}, 0
    for batch in batches:
        count, batch = batch.targets, batch.to(device)
        targets += count
        with autocast(device, dtype):
            totals["val_loss"] += model(**batch.inputs()).loss.item() * count
            totals["val_loss_blind"] += model(**batch.inputs(), blind=True).loss.item() * count
    model.train()
    return {name: total / max(1, targets) for name, total in totals.items()}


def describe(model: Flamingo) -> str:
    """What is trained and what is frozen, with counts: a table for the terminal."""
    parts = {
        "vision encoder": model.vision_encoder,
        "resampler": model.perceiver,
        "cross-attention": nn.ModuleList(x.gated_cross_attn_layer for x in model.lang_encoder._get_decoder_layers()),
    }
    counted = {id(p) for part in parts.values() for p in part.parameters()}
    rows = [(name, _counts(part.parameters())) for name, part in parts.items()]
    rows.append(("language model", _counts(p for p in model.lang_encoder.parameters() if id(p) not in counted)))
    lines = [f"{'':18}{'trained':>14}{'frozen':>14}"]
    lines += [f"{name:18}{trained:>14,}{frozen:>14,}" for name, (trained, frozen) in rows]
    trained, frozen = _counts(model.parameters())
    return "\n".join([*lines, f"{'together':18}{trained:>14,}{frozen:>14,}"])


def _counts(parameters) -> tuple[int, int]:
    parameters = list(parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters) - trained


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, frozen)."""
    return _counts(model.parameters())


def peak_memory_bytes(device: torch.device) -> int | None:
    """Of the GPU on a GPU, else of the whole process; None on Windows, where Python does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # not part of Python on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_folder(options: TrainingOptions) -> Path:
    """The run folder: that of the run to resume, or a new one. Raises InputError if a new one cannot be made or the
    named one holds something already."""
    if options.resume:
        return Path(options.resume)
    folder = Path(options.out) if options.out else Path("runs") / options.preset
    if not options.out:
        number = 2
        while folder.exists():
            folder, number = Path("runs") / f"{options.preset}-{number}", number + 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot make the run folder {folder}: {error.strerror}") from error
    if occupied:
        raise InputError(f"{folder} is not empty: choose another --out, resume it with --resume {folder}, or delete it")
    return folder
