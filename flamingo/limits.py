"""What a value from outside may be: its type, its range, and the memory it would take.

What this file teaches: a run is described by files that people edit, copy and cut short, and by options they mistype.
Every such value goes through `checked`, whether it comes from the command line, config.json, summary.json, a line of
metrics.jsonl or a resume point; so a mistake is a sentence before anything is built, not a traceback an hour later.
(Imports nothing heavy: `--help` needs it.)
"""

import contextlib
import math
import os
import sys
from pathlib import Path

from flamingo.errors import InputError

POSITIVE = sys.float_info.min  # the least float that is greater than 0
SEEDS = 2**63 - 1  # torch takes 64 bits
LARGEST = 2**53  # of a number without a range of its own: what JSON readers of all kinds agree on

# Least and most, by the name of a field. The most is far beyond use: what fits is a question of memory (`must_fit`).
RANGES = {
    # ModelConfig
    "dim": (1, 2**20), "depth": (1, 512), "dim_head": (1, 4096), "heads": (1, 1024), "num_latents": (1, 2**16),
    "max_num_frames": (0, 2**16), "max_num_media": (0, 2**16), "ff_mult": (1, 64), "every": (1, 1024),
    "init_gain": (0.0, 1e6), "query_gain": (0.0, 1e6), "latents_std": (0.0, 1e6), "image_size": (1, 4096),
    "dropout": (0.0, 0.999), "width": (1, 2**20), "shuffle": (1, 64), "num_patches": (1, 2**20),
    "lora_rank": (0, 4096), "lora_dropout": (0.0, 0.999),
    # TrainingOptions
    "seed": (0, SEEDS), "steps": (1, 10**9), "batch_size": (1, 10**7), "accumulate": (1, 10**6), "lr": (POSITIVE, 1e6),
    "gate_lr": (POSITIVE, 1e6), "lm_lr": (POSITIVE, 1e6), "weight_decay": (0.0, 1e6), "warmup_steps": (0, 10**9),
    "clip_norm": (POSITIVE, 1e30),
    "max_tokens": (1, 10**6), "eval_every": (1, 10**9), "save_every": (1, 10**9), "eval_batches": (1, 10**9),
    "workers": (0, 512), "captions_per_picture": (1, 10**6), "gate_opening": (0.0, 0.999),
    "gate_reopening": (0.0, 0.999), "where_weight": (0.0, 1e6), "skip_bad_steps": (0, 10**9),
    "patience": (0, 10**9), "patches": (POSITIVE, 1.0),
    # a step and a validation in metrics.jsonl: losses may be anything finite
    "step": (0, 10**9), "loss": (-1e30, 1e30), "val_loss": (-1e30, 1e30), "val_loss_blind": (-1e30, 1e30),
    "attn": (-1.0, 1.0), "ff": (-1.0, 1.0), "final_val_loss": (-1e30, 1e30), "final_val_loss_blind": (-1e30, 1e30),
}  # fmt: skip
CHOICES = {"act": ("gelu", "relu", "sqrelu"), "placement": ("near", "far"), "log": ("tensorboard",)}


def checked(name: str, value, kind, field: str | None = None):
    """`value`, if it is of the type `kind` (as a dataclass writes it: int, "float | None", …) and in its range; a whole
    number becomes a float where one is wanted. Raises InputError otherwise.

    name: as the user writes it. field: its key in RANGES and CHOICES, if that is not the name.
    """
    field, kind = field or name, kind.__name__ if isinstance(kind, type) else str(kind)
    if value is None and "None" in kind:
        return None
    if kind.startswith("bool"):
        return _of_type(name, value, bool, "true or false")
    if kind.startswith("list["):
        inner = kind.removeprefix("list[").partition("]")[0]
        return [checked(name, entry, inner, field) for entry in _of_type(name, value, list, "a list")]
    if kind.startswith("dict"):
        return _of_type(name, value, dict, "an object")
    if kind.startswith("str"):
        return _text(name, _of_type(name, value, str, "a text"), field)
    whole = kind.startswith("int")
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise InputError(f"{name} must be a {'whole ' if whole else ''}number, not {quoted(value)}")
    in_range(name, value, *RANGES.get(field, (0, LARGEST)))
    return value if whole else float(value)


def _of_type(name: str, value, kind: type, words: str):
    if not isinstance(value, kind):
        raise InputError(f"{name} must be {words}, not {quoted(value)}")
    return value


def _text(name: str, value: str, field: str) -> str:
    if not value.strip() or "\0" in value:
        raise InputError(f"{name} must not be {'empty' if not value.strip() else 'a text with a zero byte'}")
    if field in CHOICES and value not in CHOICES[field]:
        raise InputError(f"{name} must be one of {', '.join(CHOICES[field])}, not {quoted(value)}")
    return value


def in_range(name: str, value, least, most):
    """A number that is finite and from `least` to `most`. Raises InputError."""
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, not {value}")
    if value < least:
        wanted = {0: "not be negative", POSITIVE: "be greater than 0"}.get(least, f"be at least {least:,}")
        raise InputError(f"{name} must {wanted}, but is {quoted(value)}")
    if value > most:
        raise InputError(f"{name} must be at most {most:,}, but is {quoted(value)}")
    return value


def plain_text(name: str, text: str, tokenizer) -> None:
    """Raises InputError for a text with special tokens: the pictures are announced by ours, and nothing else may be;
    and for what a shell makes of bytes that are no UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{name} must be a text in UTF-8")
    for token in ("<image>", "<|endofchunk|>", *tokenizer.all_special_tokens):
        if token in text:
            raise InputError(f"{name} must be plain text, without {token}")


def quoted(value) -> str:
    """A value in a sentence: not more of it than fits there."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes out
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}…"


def checked_fields(values, kinds: dict[str, object], where: str, required: tuple[str, ...] = ()) -> dict:
    """A JSON object, its fields checked as far as it has them; those that `kinds` does not name are left alone.

    where: the file, for the sentence. Raises InputError.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} is damaged: it holds {quoted(values)} in place of an object")
    if missing := [name for name in required if name not in values]:
        raise InputError(f"{where} is damaged: {missing[0]!r} is missing")
    try:
        return values | {name: checked(name, values[name], kind) for name, kind in kinds.items() if name in values}
    except InputError as error:
        raise InputError(f"{where} is damaged: {error}") from None


# ---------------------------------------------------------------------------------------------------------- memory
def machine_memory() -> int | None:
    """Bytes of memory this process may use at most; None where Python does not tell (Windows)."""
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):  # a container's share; "max" is no number
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min((size for size in found if size > 0), default=None)


def must_fit(size: float, what: str, way_out: str) -> None:
    """Raises InputError if `size` bytes are more than the machine has: it would be killed without a word."""
    memory = machine_memory()
    if memory is not None and not size <= memory:
        raise InputError(f"{what} would take {_gigabytes(size)}, and this machine has {_gigabytes(memory)}: {way_out}")


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
