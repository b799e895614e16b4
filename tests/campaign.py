"""What the campaigns of hostile options, files and folders share."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from flamingo.config import TrainingOptions
from flamingo.presets import PRESETS, training_options
from flamingo.run_folder import RESUME_POINT


def options(**given) -> TrainingOptions:
    """Those of the classroom, with some given."""
    return training_options(
        PRESETS["classroom"]["training"] | {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


GOOD_FACTS = {"step": 3, "dtype": "float32", "options": dataclasses.asdict(TrainingOptions()),
              "backbones": "0" * 16, "data": "0" * 16, "tensors": "0" * 16}  # fmt: skip


def facts_file(folder: Path, facts: dict | str) -> None:
    """A resume point with these facts, and one tensor."""
    text = facts if isinstance(facts, str) else json.dumps(facts)
    save_file({"x": torch.zeros(1)}, folder / RESUME_POINT, metadata={"resume": text})
