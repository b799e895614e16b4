"""A campaign of ends: a full disk, Ctrl-C, a terminal that is closed, output that nobody reads."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from campaign import names
from safetensors.torch import load_file

from flamingo.errors import InputError, run_command
from flamingo.files import UNFINISHED, write_atomically, write_json
from flamingo.limits import checked
from flamingo.run_folder import (
    LOCK,
    METRICS,
    RESUME_POINT,
    SUMMARY,
    held,
    read_metrics,
    read_summary,
)
from flamingo.training.resume import read_facts

pytestmark = pytest.mark.usefixtures("bounded_memory")


ROOT = Path(__file__).resolve().parent.parent
# A command that a shell started in the background ignores Ctrl-C, and so would its children.
HEARS_CTRL_C = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}


def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path):
    for name in (RESUME_POINT, METRICS, SUMMARY):
        os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="no regular file"):
        read_metrics(tmp_path / METRICS, 9)
    with pytest.raises(InputError, match="no regular file"):
        read_summary(tmp_path)
    (tmp_path / SUMMARY).unlink()
    with pytest.raises(InputError, match="no regular file"):
        read_facts(tmp_path)


def test_a_temporary_file_that_cannot_even_be_made(tmp_path, refused):
    refused(lambda: write_atomically(tmp_path / "nowhere" / "x", lambda _: None), "cannot write")
    refused(lambda: write_json(tmp_path / ("x" * 300), {}), "cannot write")


def test_what_the_disk_or_the_memory_refuses_is_a_sentence_and_our_own_mistakes_are_not(refused):
    def raises(error: Exception):
        def command() -> None:
            raise error

        return command

    refused(raises(OSError(28, "No space left on device", "metrics.jsonl")), "metrics.jsonl: No space left on device")
    refused(raises(OSError(28, "No space left on device")), "No space left")
    refused(raises(MemoryError()), "out of memory")
    refused(raises(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")), "out of memory")
    for error in (OSError(2, "No such file"), RuntimeError("shapes"), ValueError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            run_command("it", raises(error))


SCRIPT = """
import os, signal, sys
from flamingo.errors import run_command, way_on
def command():
    with way_on(lambda: "give it again"):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(10**9): pass
        except BaseException:  # as some libraries do
            pass
        print("it went on")
run_command("it", command)
"""


def test_ctrl_c_cannot_be_swallowed_and_names_the_command_that_goes_on():
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, **HEARS_CTRL_C)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "\nit: stopped; give it again\n")


STOPPED = """
import os, signal, sys
from flamingo.errors import run_command
from flamingo.presets import training_options
from flamingo.run_folder import in_run_folder
def train(_, folder):
    for name in sys.argv[2:]:
        (folder / name).write_text("x")
    number = getattr(signal, os.environ.get("STOP", "SIGINT"))
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # an impatient user
run_command("it", lambda: in_run_folder(train, training_options({"out": sys.argv[1]})))
"""


@pytest.mark.parametrize("written, word", [
    ([], "there is nothing to go on with yet: give the same command again"),
    ([METRICS, RESUME_POINT], "python train.py --resume {} goes on"),
    ([RESUME_POINT, SUMMARY], "the run is finished: python evaluate.py {}"),
])  # fmt: skip
def test_what_ctrl_c_says_where_a_run_is(written, word, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", STOPPED, folder, *written]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **HEARS_CTRL_C)
    assert result.returncode == 130 and result.stderr.startswith(f"\nit: stopped; {word.format(folder)}")
    assert names(folder) == sorted([LOCK, *written])
    with held(folder):  # the lock ended with its process
        pass
    assert names(folder) == sorted(set(written) - ({RESUME_POINT} if SUMMARY in written else set()))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_polite_kill_and_a_closed_terminal_are_heard_like_ctrl_c(name, tmp_path):
    command = [sys.executable, "-c", STOPPED, tmp_path / "run", METRICS, RESUME_POINT]
    environment = os.environ | {"STOP": name}
    heard = {"preexec_fn": lambda: signal.signal(getattr(signal, name), signal.SIG_DFL)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, **heard)
    assert result.returncode == 128 + getattr(signal, name)
    assert (
        result.stderr
        == f"\nit: stopped; python train.py --resume {tmp_path / 'run'} goes on from the last point that was kept\n"
    )
    ignored = HEARS_CTRL_C | {"preexec_fn": lambda: signal.signal(getattr(signal, name), signal.SIG_IGN)}
    again = [sys.executable, "-c", STOPPED, tmp_path / "again", SUMMARY]  # as under nohup: it goes on
    assert subprocess.run(again, cwd=ROOT, env=environment, **ignored).returncode == 0


PRINTS = """
import sys
from flamingo.errors import run_command
run_command("it", lambda: [print("line", flush=len(sys.argv) > 1) for _ in range(9)])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="its pipes break otherwise")
@pytest.mark.parametrize("flushed", [[], ["at once"]])
def test_output_that_nobody_reads_ends_a_command_in_one_sentence(flushed):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", PRINTS, *flushed]
    result = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "it: stopped, for nobody reads its output any more\n")
    closed = subprocess.run([*command[:2], PRINTS], cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert closed.returncode == 0 and closed.stderr == b""


def test_letters_that_a_terminal_does_not_have_are_written_otherwise():
    code = "from flamingo.errors import run_command; run_command('it', lambda: print('ein Bär \U0001f43b'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=environment)
    assert (result.returncode, result.stdout) == (0, b"ein B\\xe4r \\U0001f43b\n")


def test_checked_says_what_it_wants():
    for value, kind, words in (
        ("3", int, "must be a whole number, not '3'"), (True, float, "must be a number, not True"),
        (10**5000, int, "must be at most"), (10**5000, float, "must be at most"), ("a\0", str, "zero byte"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            checked("x", value, kind)


# -------------------------------------------------------------------------------------------------------- real commands
SHORT = ["--batch-size", "2", "--eval-batches", "1", "--eval-every", "9", "--device", "cpu", "--dtype", "float32"]


def start(*arguments, **how) -> subprocess.Popen:
    words = [sys.executable, ROOT / "train.py", *map(str, arguments)]
    how |= {"cwd": ROOT, "env": os.environ | {"HF_HUB_OFFLINE": "1"}, "text": True}
    how = {"stderr": subprocess.PIPE} | HEARS_CTRL_C | how
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, **how)


def one_sentence(process: subprocess.Popen, *words: str) -> None:
    """The last line that is not the progress bar's, for that ends without a new line."""
    said = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1].rpartition("\r")[2]
    assert "train.py: " in last and all(word in last for word in words), said


def test_a_run_that_leaves_the_finite_numbers_ends_and_its_last_good_state_is_kept(tmp_path):
    folder = tmp_path / "run"
    wild = ["--lr", "1e6", "--gate-lr", "1e6", "--clip-norm", "1e30", "--warmup-steps", "0", "--save-every", "1"]
    one_sentence(start(*SHORT, "--steps", "9", *wild, "--out", folder), "training examples", "keeps the state of step")
    tensors = load_file(folder / RESUME_POINT)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (folder / "model.safetensors").exists() and not (folder / LOCK).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_disk_that_is_full_in_the_middle_of_a_run_costs_no_earlier_state(tmp_path):
    import resource

    folder, limit = tmp_path / "run", 12 * 2**20  # more than the first point needs, less than the second, with moments
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    run = (*SHORT, "--optimizer", "adamw", "--steps", "4", "--save-every", "1", "--out", folder)  # two moments a weight
    one_sentence(start(*run, preexec_fn=full), "cannot write")
    assert read_facts(folder)["step"] == 0 and not [name for name in names(folder) if name.startswith(UNFINISHED)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no alarm")
def test_a_polite_kill_ends_a_command_whose_words_nobody_reads(tmp_path):
    """Its progress bar fills the pipe, and what it says at its end has no room there."""
    folder = tmp_path / "run"
    reader, writer = os.pipe()
    process = start(*SHORT, "--steps", "9", "--out", folder, stderr=writer)
    while not (folder / LOCK).exists():
        time.sleep(0.01)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b" " * 4096):
            pass
    os.set_blocking(writer, True)
    process.terminate()
    assert process.wait(timeout=30) == -signal.SIGALRM
    for end in (reader, writer):
        os.close(end)


def test_ctrl_c_while_libraries_are_imported(tmp_path):
    folder = tmp_path / "run"
    process = start(*SHORT, "--steps", "4", "--out", folder)
    while not (folder / LOCK).exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert said == "\ntrain.py: stopped; there is nothing to go on with yet: give the same command again\n"
    assert names(folder) == [LOCK]  # which the next start takes for its own
