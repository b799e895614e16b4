"""A campaign of hostile run folders: who holds one, what stands in the way, and it is left as it was."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from campaign import GOOD_FACTS, facts_file, names, options

import evaluate
from flamingo.data.feature_cache import _only_one_builder
from flamingo.errors import InputError
from flamingo.files import UNFINISHED, write_json
from flamingo.run_folder import (
    LOCK,
    METRICS,
    RESUME_POINT,
    SUMMARY,
    in_run_folder,
    new,
)
from flamingo.training.command_line import parse_training_options

pytestmark = pytest.mark.usefixtures("bounded_memory")


ROOT = Path(__file__).resolve().parent.parent


HOLDER = """
import sys, time
from pathlib import Path
from flamingo.run_folder import new
with new(Path(sys.argv[1])) as folder:
    (folder / ".unfinished-x-resume.safetensors").write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_claimed_before_anything_is_built_and_a_kill_frees_it(tmp_path, refused, monkeypatch):
    folder, built = tmp_path / "deep" / "run", []
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    monkeypatch.setattr("flamingo.run_folder.PATIENCE", 0.1)
    refused(lambda: in_run_folder(lambda *_: built.append(1), options(out=folder)), "in use by another command")
    assert built == [] and any(name.startswith(UNFINISHED) for name in names(folder))  # not ours to take away
    holder.kill()
    holder.communicate()
    in_run_folder(lambda _, claimed: built.append(names(claimed)), options(out=folder))
    assert built == [[LOCK]]  # what the killed one left half-written is gone
    assert folder.is_dir() and names(folder) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks in another way")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, code):
    """Once runs/classroom-2, -3, … were made without end: a lock that nobody can have was taken for one in use."""
    import fcntl

    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=os.strerror(code)):
        in_run_folder(lambda *_: None, options())
    assert names(tmp_path / "runs") == ["classroom"]
    with pytest.raises(InputError, match=f"cannot use the feature cache .*{os.strerror(code)}"):
        _only_one_builder(tmp_path / "cache").__enter__()


def test_a_command_that_makes_nothing_of_its_folder_leaves_none(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fails(_, folder: Path) -> None:
        (folder / METRICS).touch()
        (folder / "skipped.txt").write_text("1.jpg\n")
        raise InputError("the data are no data")

    refused(lambda: in_run_folder(fails, options(out="a/b/c")), "no data")
    refused(lambda: in_run_folder(fails, options()), "no data")
    assert names(tmp_path) == []


def test_killed_before_the_first_resume_point_starting_again_works(tmp_path):
    folder = tmp_path / "run"
    for left in (
        {},
        {LOCK: ""},
        {LOCK: "", METRICS: ""},
        {METRICS: "", "skipped.txt": "1.jpg\n"},
        {f"{UNFINISHED}3": "x"},
    ):
        folder.mkdir(exist_ok=True)
        for name, text in left.items():
            (folder / name).write_text(text)
        in_run_folder(lambda _, claimed: (claimed / RESUME_POINT).write_text("x"), options(out=folder))
        assert not [name for name in names(folder) if name.startswith(UNFINISHED)]
        shutil.rmtree(folder)


@pytest.mark.parametrize("left", [
    {SUMMARY: "{}"}, {RESUME_POINT: "x"}, {METRICS: '{"step": 1}\n'}, {"skipped.txt": "mine"}, {"holiday.jpg": "x"},
    {METRICS: "", "notes.txt": "x"}, {"model.safetensors": "x"}, {".hidden": "x"}, {"sub/x": "x"},
])  # fmt: skip
def test_a_folder_that_holds_something_is_left_alone(left, tmp_path, refused):
    for name, text in left.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = names(tmp_path)
    refused(lambda: in_run_folder(lambda *_: pytest.fail("built"), options(out=tmp_path)), "is not empty")
    assert names(tmp_path) == before


def test_places_that_are_no_folders(tmp_path, refused):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/run", "x" * 300, "x/" * 3000):
        refused(lambda out=out: in_run_folder(lambda *_: pytest.fail("built"), options(out=tmp_path / out)))
    assert names(tmp_path) == ["file"]
    refused(lambda: evaluate.main(evaluate.parse([str(tmp_path)])), "no finished run")
    refused(lambda: evaluate.main(evaluate.parse([str(tmp_path / "nowhere")])), "no such run folder")
    refused(lambda: parse_training_options(["--resume", str(tmp_path)]), "start it again without --resume")
    assert names(tmp_path) == ["file"]


def read_only(folder: Path, monkeypatch) -> None:
    """As on a disk that is mounted read-only: a superuser's tests cannot make one by permissions."""
    really = os.open

    def open_(path, flags, *rest, **named):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(folder)):
            raise OSError(30, "Read-only file system", str(path))
        return really(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", open_)


def test_a_read_only_folder(tmp_path, refused, monkeypatch):
    facts_file(tmp_path, GOOD_FACTS)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / SUMMARY).write_text("{}")
    (tmp_path / "empty").mkdir()
    before = [names(path) for path in (tmp_path, tmp_path / "done", tmp_path / "empty")]
    read_only(tmp_path, monkeypatch)
    never = lambda *_: pytest.fail("built")  # noqa: E731
    for command in (
        lambda: in_run_folder(never, parse_training_options(["--resume", str(tmp_path)])),
        lambda: in_run_folder(never, options(out=tmp_path / "empty")),
        lambda: evaluate.main(evaluate.parse([str(tmp_path / "done")])),
        lambda: write_json(tmp_path / "x.json", {}),
    ):
        refused(command, "cannot write", "Read-only file system")
    assert [names(path) for path in (tmp_path, tmp_path / "done", tmp_path / "empty")] == before


def test_names_of_runs_go_on_where_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = []
    with held_new("runs/classroom"):
        in_run_folder(lambda _, folder: got.append(str(folder)), options())
    (tmp_path / "runs" / "classroom").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "classroom" / SUMMARY).write_text("{}")
    in_run_folder(lambda _, folder: got.append(str(folder)), options())
    assert got == ["runs/classroom-2", "runs/classroom-2"]


@contextlib.contextmanager
def held_new(folder: str):
    with new(Path(folder)):
        yield
