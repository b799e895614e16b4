"""Presets and training options: what `python train.py --help` prints.

Nothing heavy is imported here, so that help and mistakes answer in about a second.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from flamingo.errors import InputError


def asset(name: str) -> Path:
    """A file of the repository's assets/ folder, from a checkout or from an installed package."""
    here = Path(__file__).resolve().parent
    return next((folder / name for folder in (here / "assets", here.parent / "assets") if folder.is_dir()), here / name)


def resolve(name: str) -> str:
    """`asset:classroom/opt` → where that is on this machine; other names as they are. So a run folder can be moved."""
    return str(asset(name.removeprefix("asset:"))) if name.startswith("asset:") else name


def option(default, text: str):
    """A dataclass field with the help line of its command-line option."""
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingOptions:
    """Everything train.py can be told. A preset sets some of the defaults."""

    preset: str = option("classroom", "which recipe to train: classroom, opt-125m or gpt2")
    data: str | None = option(
        None, "what to train on: a hub name, a folder of captioned pictures, or a .jsonl, .csv or .parquet file"
    )
    image_column: str | None = option(None, "the data's picture column, if it cannot be found")
    caption_columns: str | None = option(None, "the data's caption columns, comma separated, if they cannot be found")
    out: str | None = option(None, "run folder to write; a new one under runs/ if not given")
    resume: str | None = option(
        None, "go on with the unfinished run in this folder (that of --out or the preset if none is named)"
    )
    seed: int = option(0, "random seed of weights, order and (classroom) scenes")
    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(64, "examples per step (an example: a picture with its captions, or a document)")
    accumulate: int = option(1, "batches whose gradients are added up before each optimizer step")
    lr: float = option(1e-3, "peak learning rate of all that trains but the gates")
    gate_lr: float = option(0.05, "peak learning rate of the tanh gates")
    weight_decay: float = option(0.05, "weight decay of the matrices; nothing else decays")
    warmup_steps: int = option(30, "optimizer steps of linear warmup, before the cosine")
    clip_norm: float = option(1.0, "largest norm of the gradient")
    max_tokens: int = option(128, "longest text in tokens; the rest is cut")
    eval_every: int = option(100, "optimizer steps between validations")
    save_every: int = option(100, "optimizer steps between the points a killed run can be resumed from")
    eval_batches: int = option(4, "batches of a validation")
    cache: str = option(
        "~/.cache/flamingo", "folder for features of a captioned set's pictures, encoded once (size is said); or off"
    )
    workers: int = option(0, "processes that prepare pictures; 0 prepares them in the training process")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, …")
    dtype: str = option("auto", "arithmetic: float32, bfloat16 (autocast), or auto, which measures the faster one")
    compile: bool = option(
        False, "compile the resampler and the cross-attention (torch.compile; the first steps are slow)"
    )
    gradient_checkpointing: bool = option(
        False, "compute the layers' inner values twice instead of keeping them: less memory, a third more time"
    )
    lm: str | None = option(None, "language model, Hugging Face id or folder, in place of the preset's")
    clip_model_type: str | None = option(None, "vision encoder, in place of the preset's (see flamingo/vision.py)")


# What a preset changes: in FlamingoConfig ("model") and in TrainingOptions ("training").
_LARGE_TRAINING = {
    "data": "jxie/flickr8k", "steps": 3000, "batch_size": 32, "lr": 3e-4, "gate_lr": 0.01, "warmup_steps": 200,
    "eval_every": 250, "workers": 4, "max_tokens": 64,
}  # fmt: skip
PRESETS = {
    "classroom": {
        "model": {
            "lm": "asset:classroom/opt", "clip_model_type": "asset:classroom/clip",
            "xattn_heads": 6, "xattn_dim_head": 32, "xattn_ff_mult": 2, "resampler_depth": 2, "resampler_heads": 6,
            "resampler_dim_head": 32, "resampler_num_latents": 16, "resampler_ff_mult": 2,
            "resampler_num_time_embeds": 0, "xattn_init_gain": 5.0, "resampler_init_gain": 10.0,
            "resampler_query_gain": 3.0, "resampler_latents_std": 0.5,
        },
        "training": {"steps": 720, "batch_size": 32, "lr": 3e-3, "eval_every": 240, "eval_batches": 4},
    },
    "opt-125m": {
        "model": {"lm": "facebook/opt-125m", "clip_model_type": "ViT-L-14-quickgelu:openai"},
        "training": _LARGE_TRAINING,
    },
    "gpt2": {
        "model": {"lm": "gpt2", "clip_model_type": "openai/clip-vit-base-patch32"},
        "training": _LARGE_TRAINING,
    },
}  # fmt: skip


class OneSentenceParser(argparse.ArgumentParser):
    """argparse prints its usage before a mistake; one sentence is enough."""

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def parse_training_options(argv: list[str]) -> TrainingOptions:
    """The command line of train.py: defaults, then the preset, then what was said.

    Raises InputError for an unknown preset or option, or a value out of range.
    """
    parser = OneSentenceParser(prog="train.py", description="Train a Flamingo.", allow_abbrev=False)
    for entry in dataclasses.fields(TrainingOptions):
        flag = "--" + entry.name.replace("_", "-")
        if entry.type is bool:
            parser.add_argument(flag, action="store_true", default=None, help=entry.metadata["help"])
            continue
        kind = next(kind for kind in (int, float, str) if kind.__name__ in str(entry.type))
        shown = "" if entry.default is None else f" (default: {entry.default})"
        also = {"nargs": "?", "const": ""} if entry.name == "resume" else {}
        parser.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper(),
                            help=entry.metadata["help"].replace("%", "%%") + shown, **also)  # fmt: skip
    said = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = said.get("preset", "classroom")
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if "resume" in said:
        from flamingo.resume import options_to_resume

        folder = said.pop("resume") or said.get("out") or f"runs/{preset}"
        return options_to_resume(Path(folder), said)
    options = TrainingOptions(**(PRESETS[preset]["training"] | said))
    for name in ("steps", "batch_size", "accumulate", "lr", "gate_lr", "clip_norm", "max_tokens", "eval_every",
                 "eval_batches", "save_every"):  # fmt: skip
        if getattr(options, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} must be greater than 0, not {getattr(options, name)}")
    for name in ("weight_decay", "warmup_steps", "workers"):
        if getattr(options, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(options, name)}")
    if options.dtype not in ("auto", "float32", "bfloat16"):
        raise InputError(f"--dtype must be auto, float32 or bfloat16, not {options.dtype!r}")
    return options


def model_settings(options: TrainingOptions) -> dict:
    """What FlamingoConfig is made with: the preset's model, and the backbones that were named."""
    settings = dict(PRESETS[options.preset]["model"])
    for name in ("lm", "clip_model_type"):
        if getattr(options, name):
            settings[name] = getattr(options, name)
    return settings


def read_json(path: Path) -> dict:
    """A JSON file of a run folder. Raises InputError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no finished run: it has no {path.name}") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
