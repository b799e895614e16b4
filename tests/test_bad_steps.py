"""Steps that are left out because their loss or gradient is not finite, and what a process of its own may say."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

import train
from flamingo.data.batches import Batch, Collate, batches
from flamingo.errors import InputError
from flamingo.evaluation import first_look
from flamingo.run_folder import METRICS, RESUME_POINT, SUMMARY, in_run_folder
from flamingo.training.command_line import parse_training_options
from flamingo.training.resume import ResumePoints, read_facts

ROOT = Path(__file__).resolve().parent.parent
STEPS = 4
SHORT = ["--steps", str(STEPS), "--batch-size", "2", "--eval-batches", "1", "--eval-every", "9", "--save-every", "1",
         "--dtype", "float32", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def spoiled(monkeypatch):
    """`spoiled(step, …)`: the pictures of these steps (from 1) are no numbers."""
    monkeypatch.setattr(first_look, "PICTURES", 2)
    bad: set[int] = set()

    def spoil(examples, collate: Collate, *, steps: int, skip: int = 0, **how) -> Iterator[Batch]:
        for number, batch in enumerate(batches(examples, collate, steps=steps, skip=skip, **how), skip + 1):
            if number in bad and steps == STEPS:  # a validation has one
                batch.pixel_values = batch.pixel_values * float("nan")
            yield batch

    monkeypatch.setattr("flamingo.data.batches.batches", spoil)
    return bad.update


def run(*arguments: object) -> None:
    in_run_folder(train.main, parse_training_options([*map(str, arguments)]))


def test_bad_steps_touch_nothing_are_counted_and_one_too_many_ends_the_run(spoiled, tmp_path, monkeypatch, capsys):
    folder, states, save = tmp_path / "run", {}, ResumePoints.save

    def remember(points: ResumePoints, step: int, dtype: str) -> None:
        save(points, step, dtype)
        states[step] = load_file(points.file)

    monkeypatch.setattr(ResumePoints, "save", remember)
    spoiled([2, 4])
    with pytest.raises(InputError, match=r"of step 4 is nan \(training examples \d+, \d+\), and 1 before it were left"):
        run(*SHORT, "--skip-bad-steps", "1", "--out", folder)
    same = lambda one, other: all(one[name].equal(other[name]) for name in one)  # noqa: E731
    assert same(states[1], states[2]) and not same(states[2], states[3])
    assert read_facts(folder)["step"] == 3
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [(line["step"], "loss" in line, "left_out" in line) for line in lines] == [
        (1, True, False), (2, False, True), (3, True, False)]  # fmt: skip
    assert "step 2 is left out" in "".join(capsys.readouterr())

    with pytest.raises(InputError, match=r"of step 4 is nan .* and 1 before it were left out"):
        run("--resume", folder)  # the count goes on where it was
    monkeypatch.undo()
    monkeypatch.setattr(first_look, "PICTURES", 2)
    run("--resume", folder)
    assert json.loads((folder / SUMMARY).read_text())["steps_left_out"] == 1
    assert "steps left out: 1 (see" in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_unless_it_is_allowed_the_first_bad_step_ends_the_run(spoiled, tmp_path):
    spoiled([1])
    with pytest.raises(InputError, match=r"the loss of step 1 is nan \(training examples \d+, \d+\): .*of step 0"):
        run(*SHORT, "--out", tmp_path / "run")
    assert (tmp_path / "run" / RESUME_POINT).exists()


class Vanishing(torch.utils.data.Dataset):
    """Pictures that were there when the run began."""

    curriculum = ()

    def __len__(self) -> int:
        return 4

    def length(self, _: int) -> int:
        return 1

    def __getitem__(self, index: int):
        try:
            raise FileNotFoundError(f"{index}.jpg")
        except OSError as error:
            raise InputError(f"{index}.jpg: is missing, and could be read when the run began") from error


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_in_a_process_that_prepares_pictures_is_one_sentence(workers):
    with pytest.raises(InputError) as raised:
        list(batches(Vanishing(), list, batch_size=1, steps=4, seed=0, workers=workers))
    assert str(raised.value)[1:] == ".jpg: is missing, and could be read when the run began"


READS = """
import multiprocessing, time
from flamingo.data.batches import batches

class Numbers:
    curriculum = ()
    def __len__(self): return 100
    def length(self, _): return 1
    def __getitem__(self, index): return index

if __name__ == "__main__":
    prepared = iter(batches(Numbers(), lambda _: "x" * 10**6, batch_size=1, steps=100, seed=0, workers=2))
    next(prepared)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell a process that its parent has gone")
def test_a_process_that_prepares_pictures_ends_with_the_run_that_is_killed(tmp_path):
    """Though the pipe is full of batches that nobody will read."""
    (tmp_path / "reads.py").write_text(READS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, tmp_path / "reads.py"], env=environment, stdout=subprocess.PIPE, text=True)
    workers = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    time.sleep(1)  # the pipe fills
    run.kill()
    run.wait()
    left = psutil.wait_procs(workers, timeout=60)[1]
    for worker in left:
        worker.kill()
    assert not left
