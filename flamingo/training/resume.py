"""Going on after a kill, as if nothing had happened.

What this file teaches: what the state of a training run is. The trained weights, AdamW's two moments of each and its
step count, and how many steps are done; learning rate and data order are functions of that number, and nothing in the
loop draws random numbers. All of it is one file, `resume.safetensors`, put in place in one step: whenever the run is
killed, there is the last whole one. So a run that was stopped and resumed ends with the same weights, bit for bit on a
CPU, as one that never was.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from flamingo.config import TrainingOptions
from flamingo.errors import InputError
from flamingo.files import write_atomically
from flamingo.model.vlm import Flamingo
from flamingo.training.checkpoint import load_trained

FILE = "resume.safetensors"


def save_resume_point(
    folder: Path, model: Flamingo, optimizer: torch.optim.Optimizer, options: TrainingOptions, step: int, dtype: str
) -> None:
    """Remember everything after `step` steps. dtype: the precision that was chosen at the start."""
    tensors = {f"model.{name}": tensor for name, tensor in model.trainable_state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    facts = {"step": step, "dtype": dtype, "options": dataclasses.asdict(options)}
    write_atomically(folder / FILE, lambda path: save_file(tensors, path, metadata={"resume": json.dumps(facts)}))


def read_facts(folder: Path) -> dict:
    """{"step", "dtype", "options"} of a run that can be resumed. Raises InputError when it cannot."""
    if (folder / "summary.json").exists():
        raise InputError(f"{folder} is finished: there is nothing to resume")
    try:
        with safe_open(folder / FILE, framework="numpy") as file:
            return json.loads(file.metadata()["resume"])
    except FileNotFoundError:
        raise InputError(f"{folder} cannot be resumed: it has no {FILE}") from None
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"{folder / FILE} is damaged: {error}. Start the run anew") from None


def options_to_resume(folder: Path, overrides: dict) -> TrainingOptions:
    """The options a run was started with. Raises InputError if one of `overrides` differs: it would be another run."""
    started_with = read_facts(folder)["options"]
    for name, value in overrides.items():
        if started_with.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{folder} was started with {flag} {started_with.get(name)}: resume it without {flag}")
    return TrainingOptions(**(started_with | {"resume": str(folder)}))


def restore(folder: Path, model: Flamingo, optimizer: torch.optim.Optimizer) -> tuple[int, str]:
    """Put model and optimizer back to where they were. Returns (steps done, dtype)."""
    facts = read_facts(folder)
    tensors = load_file(folder / FILE)
    trained = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    load_trained(model, trained, str(folder / FILE))
    state: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, field = name.split(".", 2)
            state.setdefault(int(number), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return facts["step"], facts["dtype"]
