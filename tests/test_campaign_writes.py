"""A disk that is full at one kind of write and at no other, odd surroundings, and nonsense given to flamingo.data: the
command ends in one sentence, loses nothing that was kept, and goes on when there is space again."""

import builtins
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from flamingo.data.captions import load_captions
from flamingo.data.feature_cache import FeatureCache
from flamingo.data.preprocess import as_pil
from flamingo.errors import InputError, run_command
from flamingo.run_folder import BEST, METRICS, RESUME_POINT, SUMMARY

SHORT = ["--batch-size", "2", "--eval-batches", "1", "--eval-every", "9", "--steps", "1", "--device", "cpu",
         "--dtype", "float32", "--patience", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Twelve pictures, and a line of one that is not there."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 100, 0)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "caption": f"cat number {i}"}) for i in range(13)]
    (folder / "metadata.jsonl").write_text("\n".join([*lines[:12], lines[12].replace("12.png", "none.png")]))
    return folder


def start(*arguments) -> None:
    train.start([str(argument) for argument in arguments])


def score(folder: Path) -> None:
    evaluate.main(evaluate.parse([str(folder), "--n", "2", "--shots", "--device", "cpu"]))


@pytest.fixture
def full(monkeypatch):
    """`full(name)`: no file of that name can be put in its place or appended to; `full(None)`: there is space again."""
    replace, open_ = os.replace, builtins.open
    no_space = lambda path: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))  # noqa: E731

    def at(name: str | None) -> None:
        def replace_(source, target, **options):
            if name and name in os.path.basename(target):
                raise no_space(target)
            return replace(source, target, **options)

        def open__(file, mode="r", *rest, **options):
            grows = "a" in mode or ("b" in mode and "r" not in mode)
            if name and grows and os.path.basename(str(file)) == name:
                return open_("/dev/full", mode, *rest, **options)
            return open_(file, mode, *rest, **options)

        monkeypatch.setattr(os, "replace", replace_)
        monkeypatch.setattr(builtins, "open", open__)

    return at


@pytest.fixture
def refused(capsys):
    def check(command, *words: str) -> None:
        with pytest.raises(SystemExit) as ended:
            run_command("it", command)
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert ended.value.code == 2 and all(word in last for word in words), last

    return check


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_a_disk_that_is_full_at_any_kind_of_write(pictures, tmp_path, full, refused):
    """The run stops at each write in turn; with space again it goes on from what was kept, to the same end."""
    arguments = [*SHORT, "--data", pictures, "--cache", tmp_path / "cache"]
    for name in ("features.npy", "skipped.txt", METRICS, RESUME_POINT):  # before there is a point to keep
        full(name)
        refused(lambda: start(*arguments, "--out", tmp_path / "run"), "No space left on device")
        assert not (tmp_path / "run").exists(), name
    full("samples.png")
    refused(lambda: start(*arguments, "--out", tmp_path / "run"), "samples.png", "No space left on device")
    for name in ("training.png", BEST, "model.safetensors", "config.json", "tokenizer.json", SUMMARY):
        full(name)
        refused(lambda: start("--resume", tmp_path / "run"), "No space left on device")
        assert (tmp_path / "run" / RESUME_POINT).exists() and not (tmp_path / "run" / SUMMARY).exists(), name
    full(None)
    start("--resume", tmp_path / "run")
    assert (tmp_path / "run" / SUMMARY).exists() and not (tmp_path / "run" / RESUME_POINT).exists()
    assert not (tmp_path / "run" / BEST).exists()
    for name in (".evaluation.partial.json", "report.html", "evaluation.json"):
        full(name)
        refused(lambda: score(tmp_path / "run"), name, "No space left on device")
    full(None)
    score(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())
    left = [file.name for file in (tmp_path / "run").iterdir()]
    assert not [name for name in left if name.startswith(".")], left


def test_odd_surroundings(pictures, tmp_path, monkeypatch, capsys):
    """No home, no temporary folder, relative paths, names in letters of elsewhere, a working directory that is gone."""
    place = tmp_path / "Läufe" / "eins"
    place.mkdir(parents=True)
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.chdir(place)
    shutil.copytree(pictures, tmp_path / "Läufe" / "Bilder für mich")
    start(*SHORT, "--data", "../Bilder für mich", "--out", "../zwei", "--cache", "../Ablage")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    score(tmp_path / "Läufe" / "zwei")  # its data were named by a relative path
    with pytest.raises(InputError, match="cannot write runs"):
        start(*SHORT, "--data", pictures)
    os.chdir("/")


# --------------------------------------------------------------------------------------------- straight into the data
@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("source", [None, 3, b"x", [], "", " ", "\0", "nobody/no such", Path("/nowhere"), "x" * 5000])
def test_what_names_no_data_set(source):
    with pytest.raises(InputError):
        load_captions(source)


def test_a_path_names_a_data_set_as_well_as_its_text_does(pictures):
    by_path, by_text = load_captions(pictures), load_captions(str(pictures))
    assert {name: len(s) for name, s in by_path.items()} == {name: len(s) for name, s in by_text.items()}


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("picture", [
    "", "/nowhere.png", "http://127.0.0.1:9/x.jpg", "data:image/png;base64,zzzz", np.zeros((0, 0, 3), dtype="uint8"),
    torch.zeros(3, 0, 4), np.zeros((4, 4, 7)), np.full((4, 4, 3), np.nan), np.full((4, 4, 3), -1), Path("/dev/null"),
])  # fmt: skip
def test_what_is_no_picture(picture):
    with pytest.raises(InputError):
        as_pil(picture)


class Encoder(torch.nn.Module):
    """(N, C, H, W) → as many patches as the first value of the first picture says, (N, v, 8)."""

    name, norm, class_token = "an encoder", True, False

    def forward(self, pixels):
        return torch.full((len(pixels), int(pixels.flatten()[0]), 8), float(pixels.flatten()[1]))


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("values, message", [
    ([], "is for no picture"), ([(4.0, 1.0)] * 16 + [(5.0, 1.0)], "different numbers of features"),
    ([(4.0, float("nan"))], "too large for float16"), ([(4.0, 1e9)], "too large for float16"),
])  # fmt: skip
def test_features_that_fit_into_no_cache(values, message, tmp_path):
    made = []
    for first, second in values:
        made.append(torch.zeros(1, 3, 2, 2))
        made[-1].flatten()[:2] = torch.tensor([first, second])
    with pytest.raises(InputError, match=message):
        FeatureCache.open_or_build(tmp_path / "cache", made, "key", Encoder())
