"""The page and its model are two processes: what one asks of the other, and what becomes of one that is left alone."""

import dataclasses
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flamingo.classroom.scenes import make_scene
from flamingo.demo.answers import Look
from flamingo.demo.model import DemoModel
from flamingo.demo.remote import GONE, QUESTIONS, RemoteModel
from flamingo.errors import InputError
from flamingo.files import asset

ROOT = Path(__file__).resolve().parent.parent
RUN = asset("classroom/flamingo")
CUE = "In a sentence:"
SCENES = [make_scene(0, "test", i, layout="row") for i in range(6)]
SCENE, PICTURE = SCENES[0], SCENES[0].draw()
SAID = SCENE.caption("sentence")


@pytest.fixture(scope="module")
def remote():
    made = RemoteModel(RUN, "cpu")
    yield made
    made.close()
    assert not made._process.is_alive()


@pytest.fixture(scope="module")
def here():
    return DemoModel(RUN, "cpu")


# ----------------------------------------------------------------------------------------------- what can be asked
def test_the_page_imports_no_pytorch():
    code = "import sys, flamingo.demo.page, flamingo.demo.__main__; print(*sorted(sys.modules))"
    pytest.importorskip("gradio", reason="the page needs requirements-demo.txt")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(result.stdout.split())
    assert "gradio" in modules and not modules & {"torch", "transformers", "torchvision", "open_clip"}


def alike(a, b) -> bool:
    """The same, but for the rounding of numbers: another process may add with other threads."""
    if isinstance(a, float):
        return a == pytest.approx(b, abs=1e-5)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and alike(dataclasses.astuple(a), dataclasses.astuple(b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


def test_another_process_answers_as_this_one_would(remote, here):
    closed = [(0.0, 0.0)] * len(here.about.trained)
    asked = {
        "stream": (PICTURE, CUE), "caption": (PICTURE, CUE, closed), "steps": (PICTURE, CUE, SAID),
        "look": (PICTURE, CUE, SAID, None), "losses": (PICTURE, CUE, SAID),
        "distance_to_language_model": (PICTURE, CUE, SAID, closed), "few_shot": ([PICTURE], [], CUE, [""]),
        "who_sees_what": ("<image> As a list:", [PICTURE]),
    }  # fmt: skip
    assert asked.keys() == set(QUESTIONS)
    assert remote.about == here.about
    for question, given in asked.items():
        named = {"names": set(SCENE.names), "scene": SCENE, "layer": 0, "head": 1} if question == "look" else {}
        there, own = (getattr(model, question)(*given, **named) for model in (remote, here))
        if question == "stream":
            there, own = list(there), list(own)
            assert len(there) > 8 and there[-1] == SAID
        if isinstance(own, Look):
            assert (there.words, there.word) == (own.words, own.word)
            lit, as_here = (np.asarray(look.picture, dtype=float) for look in (there, own))
            assert lit.shape == as_here.shape and np.abs(lit - as_here).max() <= 2  # of 255
        else:
            assert alike(there, own), question


def test_a_caption_comes_token_by_token(remote):
    pieces = remote.stream(PICTURE, CUE)
    first = next(pieces)
    assert SAID.startswith(first) and len(first) < len(SAID) / 2
    assert list(pieces)[-1] == SAID


def test_errors_are_those_of_the_model_and_it_goes_on(remote):
    with pytest.raises(ValueError, match="positions"):
        remote.caption(PICTURE, "cat " * 600)
    with pytest.raises(RuntimeError, match="TypeError"):
        remote.caption(PICTURE)
    assert not hasattr(remote, "processor")
    assert remote.caption(PICTURE, CUE) == SAID


def test_many_at_once_get_their_own_answers_though_some_leave(remote):
    said = {}

    def ask(scene):
        next(remote.stream(scene.draw(), CUE))  # and wants no more of it
        said[scene] = remote.caption(scene.draw(), CUE)

    threads = [threading.Thread(target=ask, args=(scene,)) for scene in SCENES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {scene: remote.caption(scene.draw(), CUE) for scene in SCENES}
    assert not remote._waiting


# ------------------------------------------------------------------------------------------------- when one has gone
def test_when_the_model_has_gone_who_waits_and_who_asks_gets_a_sentence():
    before = set(multiprocessing.active_children())
    remote = RemoteModel(RUN, "cpu")
    (process,) = set(multiprocessing.active_children()) - before
    threading.Timer(1, process.kill).start()  # while it loads
    with pytest.raises(InputError, match=GONE[:30]):
        remote.caption(PICTURE, CUE)
    with pytest.raises(InputError, match=GONE[:30]):
        remote.caption(PICTURE, CUE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_an_answer_cannot_be_received_who_waits_and_who_asks_gets_a_sentence():
    remote = RemoteModel(RUN, "cpu")
    assert remote.about

    def no_room():
        receive()
        raise MemoryError

    receive, remote._pipe.recv = remote._pipe.recv, no_room
    try:
        for _ in range(3):  # who waits for that answer, and who asks later
            with pytest.raises(InputError, match=GONE[:30]):
                remote.caption(PICTURE, CUE)
    finally:
        remote.close()


def living(group: int) -> list[str]:
    """Commands of the processes of a group (zombies are none: they wait for somebody to ask how they ended)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group = (folder / "stat").read_text().rpartition(") ")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append((folder / "cmdline").read_text())
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("sent, send, ready", [
    (signal.SIGKILL, os.kill, True), (signal.SIGKILL, os.kill, False), (signal.SIGTERM, os.kill, False),
    (signal.SIGINT, os.killpg, False),  # Ctrl-C: a terminal sends it to both processes
])  # fmt: skip
def test_however_the_page_ends_its_model_ends_too(sent, send, ready, tmp_path):
    """ready: when the page is there; if not, while the model is loaded."""
    pytest.importorskip("gradio", reason="the page needs requirements-demo.txt")
    log = tmp_path / "log"
    with open(log, "w") as out:
        page = subprocess.Popen(
            [sys.executable, "-m", "flamingo.demo", "--port", "8860", "--device", "cpu"], cwd=ROOT, stdout=out,
            stderr=out, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    try:
        until = time.monotonic() + 180
        while not (re.search("open http", log.read_text()) if ready else len(living(page.pid)) > 2):
            assert page.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        time.sleep(2)  # into the imports
        send(page.pid, sent)
        assert page.wait(timeout=60) == (-sent if sent == signal.SIGKILL else 128 + sent)
        for _ in range(100):
            if not living(page.pid):
                break
            time.sleep(0.1)
        assert living(page.pid) == [] and "Traceback" not in log.read_text()
    finally:
        if living(page.pid):
            os.killpg(page.pid, signal.SIGKILL)


ENDS = """
import os
from flamingo.classroom.scenes import make_scene
from flamingo.demo.remote import RemoteModel
from flamingo.files import asset
if __name__ == "__main__":  # the model's process begins by reading this
    print(RemoteModel(asset("classroom/flamingo"), "cpu").caption(make_scene(0, "test", 0).draw(), ""), flush=True)
    os._exit(0)  # as Ctrl-C does
"""


def test_a_model_that_has_spoken_ends_without_another_word(tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, tmp_path / "ends.py"], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and len(result.stdout) > 5
    assert result.stderr == "" or "trained tensors" in result.stderr.splitlines()[-1], result.stderr


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    pytest.importorskip("gradio", reason="the page needs requirements-demo.txt")
    command = [sys.executable, "-m", "flamingo.demo", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "config.json" in result.stderr, result.stderr
