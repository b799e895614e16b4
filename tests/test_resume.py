"""A run that was killed and resumed is the run that was never stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flamingo.config import TrainingOptions
from flamingo.errors import InputError
from flamingo.fast import precision
from flamingo.interop.backbones import build_flamingo
from flamingo.presets import model_config
from flamingo.training.checkpoint import load_model, save_model
from flamingo.training.command_line import parse_training_options

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--steps", "8", "--batch-size", "4", "--eval-batches", "1", "--eval-every", "4", "--save-every", "3",
         "--dtype", "float32", "--device", "cpu"]  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments, "--out", folder],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def steps_told(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def start_and_kill(folder: Path, steps: int, *arguments: str) -> None:
    """A run that is killed as soon as it has told of so many steps."""
    process = start(folder, *arguments)
    while steps_told(folder) < steps and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "summary.json").exists()


def losses(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in lines]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(folder, *SHORT).wait() == 0
    return folder


@pytest.mark.parametrize("steps_before_the_kill", [1, 5])
def test_killed_and_resumed_it_ends_the_same(never_stopped, tmp_path, steps_before_the_kill):
    folder = tmp_path / "run"
    start_and_kill(folder, steps_before_the_kill, *SHORT)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a line that the kill cut short
    assert start(folder, "--resume").wait() == 0
    one, other = load_file(never_stopped / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(one[name].equal(other[name]) for name in one)
    assert losses(folder) == losses(never_stopped)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["captions_seen"] == json.loads((never_stopped / "summary.json").read_text())["captions_seen"]
    assert not (folder / "resume.safetensors").exists()


def test_what_cannot_be_resumed_is_said(never_stopped, tmp_path):
    with pytest.raises(InputError, match="is finished: there is nothing to resume"):
        parse_training_options(["--resume", str(never_stopped)])
    with pytest.raises(InputError, match="cannot be resumed: it has no"):
        parse_training_options(["--resume", str(tmp_path)])
    (tmp_path / "resume.safetensors").write_bytes(b"half a file")
    with pytest.raises(InputError, match="is damaged"):
        parse_training_options(["--resume", str(tmp_path)])


def test_a_resumed_run_keeps_its_options(tmp_path):
    folder = tmp_path / "run"
    start_and_kill(folder, 1, *SHORT)
    assert parse_training_options(["--resume", str(folder)]).steps == 8
    with pytest.raises(InputError, match="resume it without --lr"):
        parse_training_options(["--resume", str(folder), "--lr", "0.5"])


def test_a_model_trained_in_bfloat16_is_saved_without_its_backbones_and_loads(tmp_path):
    model, processor, config = build_flamingo(model_config(TrainingOptions()))
    precision.cast_frozen_to_bf16(model)
    save_model(tmp_path, model, processor, config)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.trainable_state_dict())
    load_model(tmp_path)
