"""A run folder belongs to one command at a time.

What this file teaches: two trainings that write into one folder leave the metrics of one beside the weights of the
other. So a command claims its folder before it builds anything, by locking a file in it, and holds the lock to its end.
Such a lock ends with its process, however that ends: nothing has to be cleaned up before a killed run can go on.
(Imports nothing heavy: a folder in use is refused in a second.)
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from flamingo import ranks
from flamingo.config import TrainingOptions
from flamingo.errors import InputError, way_on
from flamingo.files import UNFINISHED, lock_of, must_be_regular, read_json, remove_unfinished, writing
from flamingo.limits import checked_fields, quoted
from flamingo.presets import training_options

SUMMARY, RESUME_POINT, METRICS, SKIPPED = "summary.json", "resume.safetensors", "metrics.jsonl", "skipped.txt"
BEST = "best.safetensors"  # the weights of the best validation so far, of a run with --patience
LOCK = ".lock"
PATIENCE = 8.0  # seconds: the workers of a killed run hold its lock until they notice, which takes them up to 5


class InUse(InputError):
    """Another command is at work in the folder."""


def in_run_folder(train: Callable[[TrainingOptions, Path], None], options: TrainingOptions) -> None:
    """`train(options, folder)` in the folder of the run to resume, or in a new one, held until it returns. (Of several
    processes the first holds it.)

    Raises InputError, and leaves no new folder behind, if the folder is in use, holds something, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        folder = ranks.of_first(lambda: _held_or_new(options, stack))
        stack.enter_context(way_on(lambda: _how_to_go_on(folder)))
        train(options, folder)


def _held_or_new(options: TrainingOptions, stack: contextlib.ExitStack) -> Path:
    return stack.enter_context(held(Path(options.resume))) if options.resume else _new(options, stack)


def _new(options: TrainingOptions, stack: contextlib.ExitStack) -> Path:
    """The folder of --out, or the first of runs/PRESET, runs/PRESET-2, … that nobody has."""
    if options.out:
        return stack.enter_context(new(Path(options.out)))
    number = 1
    while True:
        name = options.preset if number == 1 else f"{options.preset}-{number}"
        with contextlib.suppress(Occupied, InUse):
            return stack.enter_context(new(Path("runs") / name, patience=0))
        number += 1


class Occupied(InputError):
    """The folder holds something."""


@contextlib.contextmanager
def new(folder: Path, patience: float | None = None) -> Iterator[Path]:
    """Make and hold a folder for a new run; it goes again if nothing comes of the run. A folder whose run was killed
    before there was a point to resume from is as good as new. Raises InputError."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    _check_free(folder)  # before a lock is put into a folder of somebody else's
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder, patience):
            _check_free(folder)
            try:
                yield folder
            finally:
                if _is_free(folder):
                    for name in (METRICS, SKIPPED):
                        (folder / name).unlink(missing_ok=True)
    finally:
        for each in missing:
            with contextlib.suppress(OSError):  # it holds something
                each.rmdir()


@contextlib.contextmanager
def held(folder: Path, patience: float | None = None) -> Iterator[Path]:
    """Hold a folder: nobody else writes into it meanwhile, and what a killed command left half-written is taken away.
    Raises InputError if there is no such folder, it stays in use (for PATIENCE, if not given), or cannot be written."""
    from filelock import Timeout

    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")
    lock = lock_of(folder / LOCK)
    with writing(folder):
        try:
            lock.acquire(timeout=PATIENCE if patience is None else patience)
        except Timeout:  # which is an OSError too
            raise InUse(f"{folder} is in use by another command: wait for its end, or choose another folder") from None
    try:
        remove_unfinished(folder)
        if (folder / SUMMARY).exists():  # the kill came between the last two things a training does
            remove_what_a_finished_run_needs_no_more(folder)
        yield folder
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            (folder / LOCK).unlink()
        lock.release()


def remove_what_a_finished_run_needs_no_more(folder: Path) -> None:
    """Not before there is a summary: until then a run that cannot write one must be able to go on."""
    for name in (RESUME_POINT, BEST):
        (folder / name).unlink(missing_ok=True)


def _contents(folder: Path) -> set[str]:
    with writing(folder):
        found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return {name for name in found if name != LOCK and not name.startswith(UNFINISHED)}


def _is_free(folder: Path) -> bool:
    """It holds nothing, or what a run writes before there is a point to resume from: metrics without a step."""
    found = _contents(folder)
    return not found or (found <= {METRICS, SKIPPED} and METRICS in found and not (folder / METRICS).stat().st_size)


def _check_free(folder: Path) -> None:
    if _is_free(folder):
        return
    found = _contents(folder)
    advice = f"choose another --out, or delete {folder}"
    if SUMMARY in found:
        raise Occupied(f"{folder} is not empty, it holds a finished run: {advice}")
    if RESUME_POINT in found:
        raise Occupied(f"{folder} is not empty, it holds an unfinished run: go on with --resume {folder}, or {advice}")
    raise Occupied(f"{folder} is not empty: {advice}")


def _how_to_go_on(folder: Path) -> str:
    if (folder / SUMMARY).exists():
        return f"the run is finished: python evaluate.py {folder}"
    if (folder / RESUME_POINT).exists():
        start = "python" if ranks.count() == 1 else "torchrun …"
        return f"{start} train.py --resume {folder} goes on from the last point that was kept"
    return "there is nothing to go on with yet: give the same command again"


# ------------------------------------------------------------------------------------------------- a finished run
SUMMARY_FIELDS = {
    "preset": str, "seconds": float, "seconds_to_first_step": "float | None", "steps": int, "steps_left_out": int,
    "captions_seen": int,
    "captions_per_second": float, "final_val_loss": float, "final_val_loss_blind": float,
    "trainable_parameters": int, "frozen_parameters": int, "peak_memory_bytes": "int | None", "device": str,
    "dtype": str, "seed": int, "options": dict, "validation_captions": "dict | None",
}  # fmt: skip


def read_summary(folder: Path) -> tuple[dict, TrainingOptions]:
    """summary.json of a finished run, and the options in it. Raises InputError if it is not what train.py wrote."""
    file = folder / SUMMARY
    summary = checked_fields(read_json(file), SUMMARY_FIELDS, str(file), required=("dtype", "options"))
    if summary["dtype"] not in ("float32", "bfloat16"):
        raise InputError(f"{file} is damaged: dtype must be float32 or bfloat16, not {quoted(summary['dtype'])}")
    try:
        return summary, training_options(summary["options"])
    except InputError as error:
        raise InputError(f"{file} is damaged: {error}") from None


# ------------------------------------------------------------------------------------------ what it has reported so far
# Fields of a line of metrics.jsonl.
STEP = {"step": int, "loss": float, "lr": float, "captions": int, "seconds": float}
LEFT_OUT = {"step": int, "left_out": str, "seconds": float}
VALIDATION = {"step": int, "val_loss": float, "val_loss_blind": float, "attn": "list[float]", "ff": "list[float]"}
SCORES = {"exact_match": float, "cider_d": float}  # one of them, if any picture has a caption to compare with


def read_metrics(file: Path, steps_done: int) -> list[dict]:
    """The entries of metrics.jsonl up to a step, without a last line that a kill cut short. Raises InputError."""
    must_be_regular(file)
    lines, entries = file.read_text(encoding="utf-8", errors="replace").splitlines(), []
    for number, line in enumerate(lines, start=1):
        where = f"line {number} of {file}"
        try:
            entry = json.loads(line)
            found = entry if isinstance(entry, dict) else {}
            kinds = VALIDATION if "val_loss" in found else LEFT_OUT if "left_out" in found else STEP
            entries.append(checked_fields(entry, kinds | SCORES, where, required=tuple(kinds)))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            why = str(error) if isinstance(error, InputError) else f"{where} is damaged"
            raise InputError(f"{why}: take the file away and the run goes on without its losses so far") from None
    return [entry for entry in entries if entry["step"] <= steps_done]
