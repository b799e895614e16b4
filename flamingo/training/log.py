"""What a run reports: the progress bar, metrics.jsonl, the figures, samples as it goes, and the summary."""

import dataclasses
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from flamingo import ranks
from flamingo.config import TrainingOptions
from flamingo.data.processor import FlamingoProcessor
from flamingo.errors import InputError
from flamingo.evaluation.first_look import Context, marks_of, own_captions
from flamingo.evaluation.test_set import Item
from flamingo.fast.device import peak_memory_bytes
from flamingo.figures import run_figures
from flamingo.files import write_atomically, writing
from flamingo.model.vlm import Flamingo
from flamingo.run_folder import METRICS, SKIPPED, read_metrics
from flamingo.training.resume import way_out
from flamingo.training.tensorboard import TensorBoard

SHOWN = 12  # pictures in samples.png
FOLLOWED = 4  # pictures whose captions are kept at every validation


class RunLog:
    """Everything a run writes beside its weights.

    metrics.jsonl has a line per step, {"step", "loss", "lr", "captions", "seconds"}, or {"step", "left_out": why,
    "seconds"}, and a line per validation, {"step", "val_loss", "val_loss_blind", "exact_match" (or "cider_d"), "attn":
    [...], "ff": [...], "samples": [[predicted, true], ...]} with tanh(gate) of each layer, and the captions of the
    same few pictures every time.
    """

    def __init__(
        self, folder: Path, options: TrainingOptions, launched: float, skipped: list[str], steps_done: int = 0
    ):
        self.folder, self.options, self.launched = folder, options, launched
        self.writes = ranks.is_first()  # of several processes
        self.losses: dict[int, float] = {}  # by step
        self.left_out = 0  # steps
        self.validations: list[dict] = []
        self.captions_seen = 0
        self.score: dict[str, float] = {}  # of the last validation's captions
        self.followed: list[list[str]] = []  # [predicted, true] of the last validation's first captions
        self.first_step: float | None = None
        self.began = time.time()
        self._take_up(folder / METRICS, steps_done)
        with writing(folder / METRICS):
            file = folder / METRICS if self.writes else os.devnull
            self.metrics = open(file, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self.board = TensorBoard(folder, steps_done) if options.log and self.writes else None
        if skipped and self.writes:
            write_atomically(
                folder / SKIPPED, lambda path: path.write_text("\n".join(skipped) + "\n", encoding="utf-8")
            )
            print(f"{len(skipped)} pictures or captions were left out: see {folder}/skipped.txt")

    def _take_up(self, file: Path, steps_done: int) -> None:
        """A resumed run: entries up to the point it goes on from count; those after it will be written again."""
        kept = read_metrics(file, steps_done) if steps_done and file.exists() else []
        if self.writes:
            write_atomically(file, lambda path: path.write_text("".join(json.dumps(entry) + "\n" for entry in kept)))
        steps = [entry for entry in kept if "loss" in entry]
        self.validations = [entry for entry in kept if "val_loss" in entry]
        self.losses = {entry["step"]: entry["loss"] for entry in steps}
        self.left_out = sum("left_out" in entry for entry in kept)
        self.captions_seen = sum(entry["captions"] for entry in steps)
        if steps:  # the time it took counts, the time it stood still does not
            self.first_step = steps[0]["seconds"]
            self.began -= steps[-1]["seconds"]
            self.launched -= steps[-1]["seconds"]

    def _write(self, entry: dict) -> None:
        with writing(self.folder / METRICS):
            self.metrics.write(json.dumps(entry) + "\n")
            self.metrics.flush()

    def step(self, step: int, loss: float | None, captions: int, optimizer, bar: tqdm) -> None:
        """After each optimizer step. loss: mean over its target tokens, and what
        where.py adds; None: the step was left out."""
        seconds = time.time() - self.launched
        if loss is None:
            self.left_out += 1
            self._write({"step": step + 1, "left_out": "the loss or the gradient is not finite", "seconds": seconds})
            bar.write(f"step {step + 1} is left out: its loss or its gradient is not finite")
            return
        if self.first_step is None:
            self.first_step = seconds
        self.captions_seen += captions
        self.losses[step + 1] = loss
        lr = optimizer.param_groups[0]["lr"]
        entry = {"step": step + 1, "loss": loss, "lr": lr, "captions": captions, "seconds": seconds}
        self._write(entry)
        if self.board:
            self.board.step(entry)
        shown = {"loss": f"{loss:.3f}"} | {name: f"{value:.2f}" for name, value in self.score.items()}
        bar.set_postfix(shown | {"captions_per_second": f"{self.captions_seen / (time.time() - self.began):.0f}"})

    def validation(self, step: int, scores: dict[str, float], gates: list[tuple[float, float]], bar: tqdm) -> None:
        """After each validation. scores: the two losses, and the score of `samples`. Raises InputError if one of them
        is not finite."""
        if not math.isfinite(sum(scores.values())):
            raise InputError(f"the validation after step {step} gives {scores}: {way_out(self.folder)}")
        entry = {"step": step, **scores, "attn": [attn for attn, _ in gates], "ff": [ff for _, ff in gates]}
        self.validations.append(entry)
        self._write(entry | ({"samples": self.followed} if self.followed else {}))
        if self.board:
            self.board.validation(entry)
        opened = " ".join(f"{attn:+.2f}" for attn in entry["attn"])
        bar.write(
            f"step {step}: validation loss {entry['val_loss']:.3f} with the picture, "
            f"{entry['val_loss_blind']:.3f} without" + (f"; attention gates {opened}" if opened else "")
        )
        self._draw(
            "training.png",
            lambda path: run_figures.training_figure(
                path, list(self.losses), list(self.losses.values()), self.validations, self.kept()["step"]
            ),
        )

    def _draw(self, name: str, draw: Callable[[Path], None]) -> None:
        if self.writes:
            write_atomically(self.folder / name, draw)

    def kept(self) -> dict:
        """The validation of the weights that a run ends with: the best one with the option patience, else the last."""
        if not self.options.patience:
            return self.validations[-1]
        return min(self.validations, key=lambda entry: entry["val_loss"])

    def samples(
        self, model: Flamingo, processor: FlamingoProcessor, items: Sequence[Item], autocast: Context, bar: tqdm
    ) -> dict[str, float]:
        """Caption the validation pictures → their mean score by name (nothing if there are none); print two captions,
        draw a few."""
        if not items:  # documents whose first pictures have no captions
            return {}
        model.eval()
        predictions = own_captions(model, processor, items, autocast)
        model.train()
        name, marks = marks_of(items, predictions)
        self.score = {name: float(marks.mean())}
        self.followed = [[said, item.truths[0]] for said, item in zip(predictions[:FOLLOWED], items, strict=False)]
        if self.board:
            self.board.samples(max(self.losses, default=0), items, predictions)
        rng = random.Random(f"samples {self.options.seed} {len(self.validations)}")
        shown = rng.sample(range(len(items)), min(SHOWN, len(items)))
        for i in shown[:2]:
            bar.write(f"    predicted: {predictions[i]!r}   true: {items[i].truths[0]!r}")
        similar = [None if name == "exact_match" else float(mark) for mark in marks]
        rows = [(items[i].picture, predictions[i], items[i].truths[0], items[i].prompt, similar[i]) for i in shown]
        columns = list(zip(*rows, strict=True))  # pictures, predictions, truths, prompts, similarities
        self._draw("samples.png", lambda path: run_figures.samples_figure(path, *columns))
        return self.score

    def summary(self, device: torch.device, dtype: str) -> dict:
        """What is left to report at the end."""
        self.metrics.close()
        if self.board:
            self.board.close()
        seconds = time.time() - self.began
        return {
            "preset": self.options.preset,
            "seconds": time.time() - self.launched,
            "seconds_to_first_step": self.first_step,
            "steps": self.kept()["step"],
            "steps_left_out": self.left_out,
            "captions_seen": self.captions_seen,
            "captions_per_second": self.captions_seen / seconds,
            "final_val_loss": self.kept()["val_loss"],
            "final_val_loss_blind": self.kept()["val_loss_blind"],
            "peak_memory_bytes": peak_memory_bytes(device),
            "device": str(device),
            "dtype": dtype,
            "seed": self.options.seed,
            "options": dataclasses.asdict(self.options),
        }
