"""The command line of train.py: what `--help` prints. (Imports nothing heavy, so that it appears in a second.)"""

import dataclasses
import os
from pathlib import Path

from flamingo import ranks
from flamingo.config import TrainingOptions
from flamingo.errors import InputError, OneSentenceParser
from flamingo.presets import PRESETS, must_be_read, training_options
from flamingo.run_folder import RESUME_POINT


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
        also = {"resume": {"nargs": "?", "const": ""}, "data": {"action": "append"}}.get(entry.name, {})
        parser.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper(),
                            help=entry.metadata["help"].replace("%", "%%") + shown, **also)  # fmt: skip
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if "data" in given:
        given["data"] = " + ".join(given["data"])  # several, mixed by weight
    preset = given.get("preset", "classroom")
    if ranks.may_restart() and not {"out", "resume"} & given.keys():
        raise InputError("with torchrun --max-restarts, name the run folder with --out: a restart goes on in it")
    if ranks.restarts() and "out" in given and (Path(given["out"]).expanduser() / RESUME_POINT).exists():
        given.setdefault("resume", "")  # the same command again, after one of its processes was killed
    if "resume" in given:
        from flamingo.training.resume import options_to_resume

        folder = given.pop("resume") or given.get("out") or f"runs/{preset}"
        return options_to_resume(Path(folder).expanduser(), given)
    recipe = PRESETS.get(preset, {}).get("training", {})
    flag = lambda name: "--" + name.replace("_", "-")  # noqa: E731
    options = training_options(recipe | given, flag)
    must_be_read(options, flag)
    if options.data is not None and os.path.exists(options.data):
        options.data_place = os.path.abspath(options.data)
    return options
