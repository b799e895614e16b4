"""Going on after a kill, as if nothing had happened.

What this file teaches: what the state of a training run is. The trained weights, AdamW's two moments of each and its
step count, and how many steps are done and how many of them were left out; learning rate and data order are functions
of the steps done (of a stream, how far each shard has been used), and what the loop draws is one of (seed, step). All
of it is one file, `resume.safetensors`, put in place in one step: whenever the run is killed, there is the last whole
one. So a run that was stopped and resumed ends with the same weights, bit for bit on a CPU, as one that never was.
With other pictures, captions or backbones it would not, so these are named in it too.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from flamingo import ranks
from flamingo.config import ModelConfig, TrainingOptions
from flamingo.data.streams import Stream
from flamingo.errors import InputError
from flamingo.files import must_be_regular, one_line, write_atomically
from flamingo.limits import checked_fields, quoted
from flamingo.model.vlm import Flamingo
from flamingo.presets import training_options
from flamingo.run_folder import RESUME_POINT, SKIPPED, SUMMARY
from flamingo.settings import to_flat
from flamingo.training.checkpoint import check_finite, load_trained

FACTS = {"step": int, "position": dict, "dtype": str, "options": dict, "backbones": str, "data": str, "tensors": str}
LOOKED_AT = 200  # drawn scenes, of as many as there are


class ResumePoints:
    """Where a killed run goes on: one file, written again and again.

    Args:
        folder: the run folder. model, optimizer: what trains. config: as built, with the backbones' fingerprints.
        data: the sets it reads.
    """

    def __init__(
        self, folder: Path, model: Flamingo, optimizer: torch.optim.Optimizer, options: TrainingOptions,
        config: ModelConfig, data: Sequence[Dataset],
    ):  # fmt: skip
        self.file, self.model, self.optimizer, self.options = folder / RESUME_POINT, model, optimizer, options
        self.train = data[0]
        self.facts = {"backbones": _hash(to_flat(config)), "data": _hash([_contents(examples) for examples in data])}

    def save(self, step: int, dtype: str) -> None:
        """Remember everything after `step` steps. dtype: the precision that was chosen at the start.
        Raises InputError, and keeps the last point, if a tensor is not finite."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.trainable_state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        check_finite(tensors, f"after step {step}, the run's state", way_out(self.file.parent))
        position = self.train.state() if isinstance(self.train, Stream) else {}
        options = dataclasses.asdict(self.options)
        facts = {"step": step, "position": position, "dtype": dtype, "options": options, **self.facts}
        metadata = {"resume": json.dumps(facts | {"tensors": _layout(tensors)})}
        if ranks.is_first():  # what trains is the same in all processes
            write_atomically(self.file, lambda path: save_file(tensors, path, metadata=metadata))
            self._list_left_out()

    def _list_left_out(self) -> None:
        """Of a stream what cannot be used is known when it has come by."""
        if isinstance(self.train, Stream) and self.train.skipped:
            lines = "".join(f"{line}\n" for line in self.train.skipped)
            write_atomically(self.file.parent / SKIPPED, lambda path: path.write_text(lines, encoding="utf-8"))

    def restore(self) -> tuple[int, str]:
        """Put model and optimizer back to where they were. Returns (steps done, dtype).
        Raises InputError if the point is not whole, or was made with other data or backbones."""
        facts = read_facts(self.file.parent)
        for name, what in (("data", "pictures or captions"), ("backbones", "backbones or architecture")):
            if facts[name] != self.facts[name]:
                raise InputError(
                    f"{self.file.parent} cannot be resumed: its {what} have changed since it was started, so it would "
                    "be another run: put them back, or start anew"
                )
        try:
            tensors = load_file(self.file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.file} is damaged: {one_line(error)}. Start the run anew") from error
        check_finite(tensors, str(self.file), "start the run anew")
        if _layout(tensors) != facts["tensors"]:
            raise InputError(f"{self.file} is damaged: tensors are missing or of another shape. Start the run anew")
        trained = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        load_trained(self.model, trained, str(self.file))
        state: dict[int, dict] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, field = name.split(".", 2)
                state.setdefault(int(number), {})[field] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if isinstance(self.train, Stream):
            self.train.go_on(facts["position"])
        return facts["step"], facts["dtype"]


def _contents(examples: Dataset) -> str:
    """A hash of what a set shows: of captioned pictures the files and all texts, of drawn scenes some of the texts
    (another curriculum, another share of questions, another seed: all change them)."""
    if isinstance(examples, Stream):
        return examples.fingerprint
    if not hasattr(examples, "fingerprint"):
        some = range(0, len(examples), max(1, len(examples) // LOOKED_AT))
        return _hash([type(examples).__name__, len(examples), [repr(examples.texts(i)) for i in some]])
    digest = hashlib.sha256(examples.fingerprint.encode())
    for i in range(len(examples)):
        digest.update(repr(examples.texts(i)).encode())
    return digest.hexdigest()


def _layout(tensors: dict[str, torch.Tensor]) -> str:
    return _hash(sorted((name, list(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()))


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def read_facts(folder: Path) -> dict:
    """FACTS of a run that can be resumed, with the options as `TrainingOptions`. Raises InputError when it cannot."""
    file = folder / RESUME_POINT
    if (folder / SUMMARY).exists():
        raise InputError(f"{folder} is finished: there is nothing to resume")
    if not file.exists():
        raise InputError(f"{folder} cannot be resumed: it has no {RESUME_POINT}; start it again without --resume")
    must_be_regular(file)
    try:
        with safe_open(file, framework="numpy") as opened:
            facts = json.loads(opened.metadata()["resume"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {one_line(error)}. Start the run anew") from error
    facts = checked_fields(facts, FACTS, str(file), required=tuple(FACTS.keys() - {"position"}))
    facts = {"position": {}} | facts  # a point of before there were streams
    try:
        facts["options"] = training_options(facts["options"])
    except InputError as error:
        raise InputError(f"{file} is damaged: {error}") from None
    if facts["dtype"] not in ("float32", "bfloat16") or facts["step"] > facts["options"].steps:
        raise InputError(f"{file} is damaged: step {facts['step']}, {quoted(facts['dtype'])} are not of such a run")
    return facts


def options_to_resume(folder: Path, overrides: dict) -> TrainingOptions:
    """The options a run was started with. Raises InputError if one of `overrides` differs: it would be another run."""
    options = read_facts(folder)["options"]
    for name, value in overrides.items():
        if getattr(options, name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{folder} was started with {flag} {getattr(options, name)}: resume it without {flag}")
    return dataclasses.replace(options, resume=str(folder))


def way_out(folder: Path) -> str:
    """What to do about a run that left the finite numbers: where the last good state is, and how not to come here."""
    kept = f"of step {read_facts(folder)['step']}" if (folder / RESUME_POINT).exists() else "of no step"
    return f"{folder} keeps the state {kept}; start anew with a smaller --lr or --gate-lr, or with --dtype float32"
