"""A small set is learned by heart: the best weights are kept, and training stops when it gets no better."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_flamingo
from PIL import Image
from safetensors.torch import load_file

import train
from flamingo.config import TrainingOptions
from flamingo.data.batches import Batch
from flamingo.errors import InputError
from flamingo.run_folder import BEST, in_run_folder, remove_what_a_finished_run_needs_no_more
from flamingo.training import best, loop
from flamingo.training.command_line import parse_training_options
from flamingo.training.log import RunLog


def validated(log: RunLog, kept: best.Best, step: int, loss: float) -> bool:
    log.validations.append({"step": step, "val_loss": loss, "val_loss_blind": 4.0})
    return kept.should_stop()


@pytest.fixture
def log(tmp_path) -> RunLog:
    return RunLog(tmp_path, TrainingOptions(patience=2), 0.0, [])


def test_the_best_weights_come_back_when_it_has_got_no_better(tmp_path, log):
    model = tiny_flamingo()
    kept = best.Best(tmp_path, model, log, patience=2)
    latents = model.vision_tokenizer.latents
    stops = []
    for step, loss in enumerate([3.0, 2.5, 2.6, 2.7], start=1):
        with torch.no_grad():
            latents.fill_(step)
        stops.append(validated(log, kept, step, loss))
    assert stops == [False, False, False, True]
    kept.restore()
    assert (latents == 2).all()  # as after the second validation, the one with the least loss
    assert log.kept()["step"] == 2 and (tmp_path / BEST).exists()  # for a run whose summary finds the disk full
    kept.restore()
    remove_what_a_finished_run_needs_no_more(tmp_path)
    assert not (tmp_path / BEST).exists()


def test_without_patience_nothing_is_kept_and_nothing_stops(tmp_path):
    log = RunLog(tmp_path, TrainingOptions(), 0.0, [])
    kept = best.Best(tmp_path, tiny_flamingo(), log, patience=0)
    assert [validated(log, kept, step, 1.0 + step) for step in range(5)] == [False] * 5
    kept.restore()
    assert log.kept()["step"] == 4 and not (tmp_path / BEST).exists()


def test_best_weights_that_were_taken_away_are_missed(tmp_path, log):
    kept = best.Best(tmp_path, tiny_flamingo(), log, patience=1)
    validated(log, kept, 1, 1.0)
    (tmp_path / BEST).unlink()
    with pytest.raises(InputError, match=r"best\.safetensors, the best weights, cannot be read"):
        kept.restore()


def test_a_step_sees_some_patches_the_same_ones_whenever_it_is_done_again():
    ids = torch.zeros(2, 3, dtype=torch.long)
    features = torch.arange(20.0).view(1, 1, 20, 1).expand(2, 1, 20, 4)
    batch = Batch(ids, ids, ids, texts_per_image=1, features=features)
    options = SimpleNamespace(patches=0.7, seed=3)
    some = [loop.some_patches(batch, step, options).features for step in (5, 5, 6)]
    assert some[0].shape == (2, 1, 14, 4) and some[0][0, 0, :, 0].unique().numel() == 14
    assert some[0].equal(some[1]) and not some[0].equal(some[2])
    assert loop.some_patches(batch, 5, SimpleNamespace(patches=1, seed=3)) is batch


def test_a_run_that_gets_worse_ends_early_with_the_weights_it_had_before(tmp_path, capsys):
    data = tmp_path / "set" / "train"
    data.mkdir(parents=True)
    rows = []
    for i in range(8):
        Image.new("RGB", (40, 30), (30 * i, 90, 120)).save(data / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "caption": f"a picture of shade {i}"}))
    (data / "metadata.jsonl").write_text("\n".join(rows))
    words = ["--data", tmp_path / "set", "--out", tmp_path / "run", "--cache", tmp_path / "cache", "--steps", "40",
             "--batch-size", "2", "--eval-every", "2", "--lr", "3", "--warmup-steps", "1", "--patience", "2",
             "--patches", "0.5", "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    in_run_folder(train.main, parse_training_options(list(map(str, words))))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "val_loss" in line]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    least = min(validations, key=lambda line: line["val_loss"])
    assert summary["steps"] == least["step"] == validations[-3]["step"] < 40
    assert summary["final_val_loss"] == least["val_loss"]
    assert f"weights of step {least['step']}" in capsys.readouterr().out
    assert not (tmp_path / "run" / BEST).exists()
    assert load_file(tmp_path / "run" / "model.safetensors")
