"""train.py and evaluate.py as a user starts them: what they leave behind, and what they say when something is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data import photograph

from flamingo.errors import InputError
from flamingo.files import write_atomically
from flamingo.training.checkpoint import load_model
from flamingo.training.command_line import parse_training_options

ROOT = Path(__file__).resolve().parent.parent
SUMMARY_KEYS = {
    "preset", "seconds", "seconds_to_first_step", "steps", "captions_seen", "captions_per_second", "final_val_loss",
    "final_val_loss_blind", "trainable_parameters", "frozen_parameters", "peak_memory_bytes", "device", "dtype", "seed",
}  # fmt: skip
SHORT = ["--steps", "4", "--batch-size", "6", "--eval-batches", "1", "--eval-every", "2", "--device", "cpu"]


def run(script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def one_sentence(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A short classroom run, evaluated."""
    folder = tmp_path_factory.mktemp("run") / "classroom"
    result = run("train.py", *SHORT, "--out", folder, "--accumulate", "2", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    assert "cross-attention" in result.stdout and "frozen" in result.stdout
    assert "without" in result.stderr + result.stdout
    result = run("evaluate.py", folder, "--n", "20", "--device", "cpu", "--shots", "0", "1", "--trials", "1")
    assert result.returncode == 0, result.stderr
    assert "exact_match_blind" in result.stdout
    return folder


def test_the_run_folder_holds_what_readme_says(finished):
    assert json.loads((finished / "summary.json").read_text()).keys() >= SUMMARY_KEYS
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["captions_seen"] > 40 and summary["dtype"] == "float32"
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [2, 4] and len(validations[0]["attn"]) == 2
    for name in ("training.png", "samples.png"):
        with Image.open(finished / name) as picture:
            assert picture.width > 400
    assert (finished / "tokenizer.json").exists()
    leftovers = [path.name for path in finished.iterdir() if path.name.startswith(".")]
    assert leftovers == []


def test_only_trained_tensors_are_saved(finished):
    tensors = load_file(finished / "model.safetensors")
    summary = json.loads((finished / "summary.json").read_text())
    assert sum(tensor.numel() for tensor in tensors.values()) == summary["trainable_parameters"]
    committed = json.loads((ROOT / "assets" / "classroom" / "flamingo" / "summary.json").read_text())
    assert summary["frozen_parameters"] == committed["frozen_parameters"]  # whatever was packed meanwhile
    assert not any("decoder_layer." in name or "vision_encoder" in name for name in tensors)
    model, _, _ = load_model(finished)
    own = model.trainable_state_dict()
    assert own.keys() == tensors.keys()
    assert all((own[name] == tensors[name]).all() for name in own)


def test_evaluation_holds_what_readme_says(finished):
    result = json.loads((finished / "evaluation.json").read_text())
    assert result["n"] == 20
    for name in ("exact_match", "exact_match_blind", "exact_match_shuffled", "exact_match_novel"):
        assert 0 <= result[name] <= 1
    assert sum(group["n"] for group in result["by_objects"].values()) == 20
    assert {"exact_match", "exact_match_blind", "exact_match_shuffled"} <= result["by_objects"]["1"].keys()


def test_the_same_seed_gives_the_same_run(finished, tmp_path):
    result = run("train.py", *SHORT, "--out", tmp_path / "again", "--accumulate", "2", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    a, b = load_file(finished / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert all((a[name] == b[name]).all() for name in a)


def test_a_folder_of_pictures_trains_and_evaluates(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i, mode in enumerate(["RGB", "L", "CMYK", "RGB", "RGB", "RGB", "RGB", "RGB"]):
        photograph(folder / f"{i}.jpg", i, mode=mode)
        rows.append({"file_name": f"{i}.jpg", "caption_0": f"a picture of {i}", "caption_1": "a circle"})
    Image.new("LA", (40, 40), (90, 120)).save(folder / "la.png")
    Image.new("P", (40, 40)).save(folder / "p.png")
    Image.new("I;16", (40, 40), 999).save(folder / "deep.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    rows += [{"file_name": name, "caption_0": "odd", "caption_1": None} for name in
             ("la.png", "p.png", "deep.png", "broken.jpg")]  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cache = tmp_path / "cache"
    result = run("train.py", *SHORT, "--data", folder, "--out", tmp_path / "run", "--workers", "1", "--cache", cache)
    assert result.returncode == 0, result.stderr
    assert "MB for 11 pictures" in result.stdout and len(list(cache.glob("*/features.npy"))) == 1
    assert "broken.jpg: cannot be read" in (tmp_path / "run" / "skipped.txt").read_text()
    result = run("evaluate.py", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["exact_match_novel"] is None


def test_every_module_can_be_imported_where_python_lacks_the_modules_of_unix():
    # As on Windows, for what is ours: other libraries ask for them on Unix whenever they please.
    code = """
import builtins, importlib, pkgutil
real = builtins.__import__
def on_windows(name, globals=None, *rest, **named):
    asked_by = (globals or {}).get("__name__", "").split(".")[0]
    if name in ("fcntl", "resource") and asked_by in ("flamingo", "train", "evaluate"):
        raise ImportError(name)
    return real(name, globals, *rest, **named)
builtins.__import__ = on_windows
import flamingo, train, evaluate
for module in pkgutil.walk_packages(flamingo.__path__, "flamingo."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("arguments, reason", [
    (["--preset", "opt-66b"], "unknown preset 'opt-66b': choose one of classroom, photos, photos-flamingo, opt-125m"),
    (["--stepz", "5"], "unrecognized arguments: --stepz"),
    (["--steps", "many"], "invalid int value"),
    (["--steps", "0"], "--steps must be at least 1, but is 0"),
    (["--warmup-steps", "-1"], "--warmup-steps must not be negative"),
    (["--dtype", "float8"], "--dtype must be"),
])  # fmt: skip
def test_mistakes_in_options(arguments, reason):
    with pytest.raises(InputError, match=reason):
        parse_training_options(arguments)


def test_mistakes_end_with_one_sentence_and_exit_code_2(tmp_path):
    one_sentence(run("train.py", "--preset", "opt-66b"), "unknown preset")
    one_sentence(run("evaluate.py", tmp_path / "nowhere"), "no such run folder")
    one_sentence(run("evaluate.py", tmp_path), "no finished run", "summary.json")
    (tmp_path / "empty").mkdir()
    one_sentence(run("train.py", "--data", tmp_path / "empty", "--out", tmp_path / "run"), "is empty")
    assert not (tmp_path / "run").exists()


def test_a_preset_whose_backbones_cannot_be_reached_says_so(tmp_path):
    result = run("train.py", "--preset", "opt-125m", "--out", tmp_path / "run", "--lm", "nobody/opt-125m")
    one_sentence(result, "cannot load the language model nobody/opt-125m", "--preset photos and --preset")
    assert not (tmp_path / "run").exists()


def test_an_occupied_run_folder_is_left_alone(finished):
    before = (finished / "summary.json").read_bytes()
    one_sentence(run("train.py", *SHORT, "--out", finished), "is not empty")
    assert (finished / "summary.json").read_bytes() == before


def broken_copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path):
    folder = broken_copy(finished, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("perceiver.latents")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"belongs to another model: 1 tensors missing.*perceiver\.latents"):
        load_model(folder)


def test_other_backbone_weights_are_refused(finished, tmp_path):
    folder = broken_copy(finished, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lm_fingerprint": "0123456789abcdef"}))
    with pytest.raises(InputError, match="trained with other weights"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"dim_visual": 1024}))
    with pytest.raises(InputError, match="dim_visual=1024, but the backbone has 192"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"freeze_vision_model": False}))
    with pytest.raises(InputError, match="vision encoder is frozen"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_model(folder)


def test_a_truncated_checkpoint_is_refused(finished, tmp_path):
    folder = broken_copy(finished, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_model(folder)


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "summary.json"
    target.write_text("old")

    def fill_the_disk(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write .*No space left"):
        write_atomically(target, fill_the_disk)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_help_names_every_option_with_its_default():
    result = run("train.py", "--help")
    assert result.returncode == 0 and "--gate-lr" in result.stdout and "(default: 0.05)" in result.stdout
