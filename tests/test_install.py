"""The package as it is installed: a wheel that holds the classroom, and the command `flamingo`, from another folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from flamingo.classroom.scenes import make_scene

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
COMMAND = "import sys; from flamingo.commands import main; sys.argv[0] = 'flamingo'; main()"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's contents, in a folder that stands for site-packages."""
    setuptools = pytest.importorskip("setuptools", minversion="77", reason="needs setuptools to build a wheel")
    assert setuptools
    source, built = tmp_path_factory.mktemp("source") / "flamingo", tmp_path_factory.mktemp("built")
    source.mkdir()
    for name in ("flamingo", "assets", "train.py", "evaluate.py", "pyproject.toml", "README.md", "LICENSE",
                 "requirements.txt", "requirements-demo.txt"):  # fmt: skip
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    result = subprocess.run([sys.executable, "-c", BUILD, built], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = built.glob("*.whl")
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    assert "flamingo = flamingo.commands:main" in next(site.glob("*.dist-info/entry_points.txt")).read_text()
    return site


def flamingo(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", COMMAND, *map(str, arguments)], cwd=folder, env=environment,
                          capture_output=True, text=True)  # fmt: skip


def test_it_holds_every_module_and_nothing_else_at_the_top(installed):
    top = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"flamingo"}
    packed = {path.relative_to(installed) for path in (installed / "flamingo").rglob("*.py")}
    here = {path.relative_to(ROOT) for path in (ROOT / "flamingo").rglob("*.py")}
    assert here <= packed and packed - here == {Path("flamingo/scripts/train.py"), Path("flamingo/scripts/evaluate.py")}


def test_it_trains_and_captions_from_another_folder(installed, tmp_path):
    small = ["--steps", "1", "--batch-size", "2", "--eval-batches", "1", "--device", "cpu", "--dtype", "float32"]
    result = flamingo(installed, tmp_path, "train", *small)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "classroom" / "README.md").is_file()
    scene = make_scene(0, "test", 0)
    scene.draw().save(tmp_path / "scene.png")
    committed = installed / "flamingo" / "assets" / "classroom" / "flamingo"
    result = flamingo(installed, tmp_path, "caption", committed, "scene.png", "--prompt", "In a sentence:")
    assert result.stdout == f"scene.png\t{scene.caption('sentence')}\n", result.stderr


def test_its_help_and_its_mistakes(installed, tmp_path):
    result = flamingo(installed, tmp_path, "--help")
    assert all(f"flamingo {name}" in result.stdout for name in ("train", "evaluate", "caption", "demo", "doctor"))
    assert "--gate-lr" in flamingo(installed, tmp_path, "train", "--help").stdout
    assert "--shots" in flamingo(installed, tmp_path, "evaluate", "--help").stdout
    assert "--port" in flamingo(installed, tmp_path, "demo", "--help").stdout
    result = flamingo(installed, tmp_path, "sing")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "unknown command 'sing'" in result.stderr
    result = flamingo(installed, tmp_path, "evaluate", "nowhere")
    assert result.returncode == 2 and result.stderr == "evaluate.py: nowhere: no such run folder\n"
