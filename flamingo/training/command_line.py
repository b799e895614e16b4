"""The command line of train.py: what `--help` prints. (Imports nothing heavy, so that it appears in a second.)"""

import dataclasses
import os
from pathlib import Path

from flamingo.config import TrainingOptions
from flamingo.errors import InputError, OneSentenceParser
from flamingo.presets import PRESETS, model_config


def parse_training_options(argv: list[str]) -> TrainingOptions:
    """The command line of train.py: defaults, then the preset, then what was given.

    Raises InputError for an unknown preset or option, or a value out of range.
    """
    parser = OneSentenceParser(prog="train.py", description="Train a Flamingo.", allow_abbrev=False)
    for entry in dataclasses.fields(TrainingOptions):
        if "help" not in entry.metadata:
            continue
        flag = "--" + entry.name.replace("_", "-")
        if entry.type is bool:
            parser.add_argument(flag, action="store_true", default=None, help=entry.metadata["help"])
            continue
        if entry.name == "overrides":
            parser.add_argument(
                "--set", dest="overrides", action="append", metavar="PART.FIELD=VALUE", help=entry.metadata["help"]
            )
            continue
        kind = next(kind for kind in (int, float, str) if kind.__name__ in str(entry.type))
        shown = "" if entry.default is None else f" (default: {entry.default})"
        also = {"nargs": "?", "const": ""} if entry.name == "resume" else {}
        parser.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper(),
                            help=entry.metadata["help"].replace("%", "%%") + shown, **also)  # fmt: skip
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = given.get("preset", "classroom")
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if "resume" in given:
        from flamingo.training.resume import options_to_resume

        folder = given.pop("resume") or given.get("out") or f"runs/{preset}"
        return options_to_resume(Path(folder), given)
    options = TrainingOptions(**(PRESETS[preset]["training"] | given))
    for name in ("steps", "batch_size", "accumulate", "lr", "gate_lr", "clip_norm", "captions_per_picture",
                 "max_tokens", "eval_every", "eval_batches", "save_every"):  # fmt: skip
        if getattr(options, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} must be greater than 0, not {getattr(options, name)}")
    for name in ("weight_decay", "warmup_steps", "workers"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(options, name)}")
    if options.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--dtype must be auto, float32 or bfloat16, not {options.dtype!r}")
    if options.data is not None and os.path.exists(os.path.expanduser(options.data)):
        options.data_place = os.path.abspath(os.path.expanduser(options.data))
    model_config(options)  # a mistake in --set is found here
    return options
