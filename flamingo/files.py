"""Files that are whole or absent, and where things are. (Imports nothing heavy: `--help` needs it.)"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from flamingo.errors import InputError


def asset(name: str) -> Path:
    """A file of the repository's assets/ folder, from a checkout or from an installed package."""
    here = Path(__file__).resolve().parent
    return next((folder / name for folder in (here / "assets", here.parent / "assets") if folder.is_dir()), here / name)


def resolve(name: str) -> str:
    """`asset:classroom/opt` → where that is on this machine; other names as they are. So a run folder can be moved."""
    return str(asset(name.removeprefix("asset:"))) if name.startswith("asset:") else name


UNFINISHED = ".unfinished-"  # how the name of a file begins until it is whole


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then put it in place in one step: a kill or a full disk leaves the old file or
    none. Raises InputError when the disk is full or the folder cannot be written; nothing is left behind then."""
    from safetensors import SafetensorError

    temporary = None
    try:
        with writing(path):
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED, suffix=f"-{path.name}")
            os.close(handle)
            try:
                write(Path(temporary))
            except SafetensorError as error:  # which has the disk's error as text only
                raise OSError(str(error)) from error
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be written is the user's to mend: an InputError that names `path`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"cannot write {path}: {why}. Free some space or choose another folder") from error


def lock_of(path: Path):
    """filelock's FileLock, and never its "soft" one, which outlives a process that is killed on another machine: where
    a file system has no locks, to acquire it raises OSError."""
    from filelock import FileLock  # here: most commands need none

    return FileLock(path, fallback_to_soft=False)


def remove_unfinished(folder: Path) -> None:
    """Take away what a killed process left half-written. Only for who alone writes into the folder."""
    for path in folder.glob(f"{UNFINISHED}*"):
        with writing(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(path: Path, value) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path: Path) -> dict:
    """A JSON object of a run folder. Raises InputError if it is missing or damaged."""
    must_be_regular(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no finished run: it has no {path.name}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is damaged: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it does not hold an object")
    return value


def must_be_regular(path: Path) -> None:
    """Raises InputError for a pipe, a device or a folder: one would be waited for without end, another has none."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is damaged: it is no regular file")


def one_line(error: BaseException) -> str:
    """What an error of another library says first; of torch's "Error(s) in loading …:" also which."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


# Options of every `from_pretrained`: of a hub, and what auto classes and pipelines pass along without effect here.
OF_A_HUB = {"revision", "token", "cache_dir", "local_files_only", "force_download"}
PASSED_ALONG = {"trust_remote_code", "code_revision", "proxies", "_from_auto", "_from_pipeline", "_commit_hash"}
OF_A_MODEL = ["*.json", "*.safetensors", "*.txt", "*.jinja", "README.md"]  # files of a hub's repository


def find_folder(name: str | Path, hub_options: dict) -> Path:
    """A folder, or the local copy of a hub repository. Raises InputError when there is neither."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    options = {key: hub_options[key] for key in OF_A_HUB if hub_options.get(key) is not None}
    try:
        return Path(snapshot_download(str(name), allow_patterns=OF_A_MODEL, **options))
    except (OSError, ValueError, HFValidationError) as error:  # no network, no such repository, no such name
        raise InputError(f"{name} is neither a folder nor a model on the hub that can be reached") from error


def sample(tensor):
    """64 values of a tensor, evenly spaced, in its own dtype on the CPU: enough to see that it is another."""
    import torch

    values = tensor.detach()
    if type(values).__module__.startswith("torchao"):  # its quantized tensors know few operations, this is one
        values = values.dequantize()
    flat = values.flatten()
    count = min(64, len(flat))
    # In whole numbers: float32 cannot count the 39 million values of OPT-125m's token embeddings.
    return flat[torch.arange(count, device=flat.device) * (len(flat) - 1) // max(1, count - 1)].cpu()


def fingerprint(module) -> str:
    """16 hex digits that tell one set of weights from another: a hash of names, shapes and a sample of each tensor."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(sample(value).float().numpy().tobytes())
    return digest.hexdigest()[:16]
