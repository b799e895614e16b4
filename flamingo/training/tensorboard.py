"""`--log tensorboard`: what a run reports, drawn as it goes by TensorBoard (`tensorboard --logdir runs`).

It lies beside metrics.jsonl, which has the same numbers and stays what a run is resumed and judged by.
"""

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from flamingo.errors import InputError
from flamingo.evaluation.test_set import Item

PICTURES = 4  # shown with their captions at each validation
FOLDER = "tensorboard"


class TensorBoard:
    """Raises InputError if the package tensorboard is missing."""

    def __init__(self, folder: Path, steps_done: int = 0):
        if importlib.util.find_spec("tensorboard") is None:
            raise InputError("--log tensorboard needs the package tensorboard: pip install tensorboard")
        self.folder, self.steps_done = folder / FOLDER, steps_done

    @cached_property
    def writer(self):
        """Opened at the first step: a run that is killed before has left nothing (run_folder.py)."""
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run writes its steps again from where it goes on: what came after is purged.
        return SummaryWriter(str(self.folder), purge_step=self.steps_done + 1 if self.steps_done else None)

    def step(self, entry: dict) -> None:
        """entry: of metrics.jsonl."""
        for name in ("loss", "lr"):
            self.writer.add_scalar(f"training/{name}", entry[name], entry["step"])

    def validation(self, entry: dict) -> None:
        """entry: of metrics.jsonl."""
        for name, value in entry.items():
            if name in ("attn", "ff"):
                for layer, opened in enumerate(value):
                    self.writer.add_scalar(f"gates/{name}_{layer}", opened, entry["step"])
            elif isinstance(value, float):
                self.writer.add_scalar(f"validation/{name}", value, entry["step"])
        self.writer.flush()

    def samples(self, step: int, items: Sequence[Item], predictions: Sequence[str]) -> None:
        """The first pictures with the captions they get: the same at every validation."""
        for i, (item, said) in enumerate(zip(items[:PICTURES], predictions, strict=False)):
            self.writer.add_image(f"sample {i}", np.asarray(item.picture.convert("RGB")), step, dataformats="HWC")
            text = f"**{item.prompt or '(no prompt)'}**\n\n{said}\n\ntrue: {item.truths[0]}"
            self.writer.add_text(f"sample {i}", text, step)

    def close(self) -> None:
        self.writer.close()
