"""Of torch: the default dtype, which a library sets while it builds a model; an assertion that does not wait for a GPU;
oneDNN's own order of a matrix; which weights DistributedDataParallel leaves alone and FSDP2 splits."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from flamingo.errors import InputError
from flamingo.interop.compat.versions import installed, range_of, unlike


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new tensors are of this dtype, whatever a library has set for the model that it is building."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------------------------------------- assertions
def check_values(holds: Tensor, mistake: Callable[[int], str]) -> None:
    """Raises ValueError unless all of `holds` (N, …), bool, is True: `mistake(i)` is the sentence for the first that is
    not.

    To look at the values of a tensor on a GPU is to wait for all its work. There the GPU checks by itself, without a
    wait, and its program ends with an assertion (torch's own, which is private). So it is in a traced or exported call,
    where the values are not there yet.
    """
    if holds.device.type == "cpu" and not torch.compiler.is_compiling():
        if not holds.all():
            raise ValueError(mistake(int((~holds).nonzero()[0, 0])))
    else:
        torch._assert_async(holds.all(), "a check of image_index or <image> tokens failed: on a CPU it has a sentence")


# -------------------------------------------------------------------------------------------------------- oneDNN
def has_onednn(dtype: torch.dtype) -> bool:
    """Does this torch multiply by oneDNN on this CPU, in this dtype, and can a matrix be kept in oneDNN's order?"""
    if not torch.backends.mkldnn.is_available():
        return False
    operators = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    missing = [name for name in operators if not hasattr(torch.ops.mkldnn, name)]
    if missing:
        raise unlike("torch", f"has no oneDNN operator {missing[0]}")
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def without_onednn_warning() -> str | None:
    """A sentence for a torch that has no oneDNN; None if it has."""
    if torch.backends.mkldnn.is_available():
        return None
    return (
        f"torch {installed('torch')} has no oneDNN, so generating on this CPU takes about twice as long: the "
        f"package index's own builds {range_of('torch')} have it"
    )


def onednn_order(weight: Tensor) -> Tensor:
    """A matrix (D_out, D_in) as oneDNN reads it; only `onednn_linear` understands it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, D_in) times a matrix of `onednn_order` → (…, D_out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """torch takes oneDNN for every product in bfloat16 unless it is switched off, for the whole process."""
    was_enabled = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = False
        yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled


# ------------------------------------------------------------------------------------------ torch.distributed
def data_parallel(model: nn.Module, frozen: list[str]) -> nn.parallel.DistributedDataParallel:
    """The model in a DistributedDataParallel that leaves these parameters alone: they are neither sent round at its
    start nor expected to get a gradient. (In torch the way to say so has no public name yet.)"""
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(model, frozen)
    named = inspect.signature(ddp).parameters  # no buffer changes while a model trains
    return ddp(model, **{"forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers": False})


def fully_shard_around(whole: set[nn.Parameter], device_type: str) -> Callable:
    """FSDP2's `fully_shard`, over all processes, that leaves some parameters whole. Raises InputError if torch is too
    old for that."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not can_shard():
        raise InputError(f"--shard needs torch 2.7 or newer, and {installed('torch')} is installed")
    # It fears for what changes a layer's output in place, and nothing does: its gradients are tested against the whole.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device_type, (torch.distributed.get_world_size(),))
    return functools.partial(fully_shard, mesh=mesh, ignored_params=whole)


def can_shard() -> bool:
    """Can `fully_shard` leave some parameters whole?"""
    from torch.distributed.fsdp import fully_shard

    return "ignored_params" in inspect.signature(fully_shard).parameters


def fetch_before(sharded: nn.Module, methods: Iterable[str]) -> None:
    """Let these methods find the weights whole, as forward does."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for method in methods:
        register_fsdp_forward_method(sharded, method)


def is_sharded(parameter: Tensor) -> bool:
    """Is only a piece of it in this process?"""
    return hasattr(parameter, "device_mesh")
