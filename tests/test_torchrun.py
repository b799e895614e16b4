"""Runs of several processes, started as a user starts them: killed, resumed on more and on fewer, restarted; what is
wrong is said once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flamingo.interop import compat

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
STEPS = 12


def launch(processes: int, *arguments: str, script: str = "train.py", restarts: int = 0, **io) -> subprocess.Popen:
    """`torchrun … script arguments`; without torchrun for one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                "--max-restarts", str(restarts), "--"] if processes > 1 else []  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **io,
    )  # fmt: skip


def output(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out + err


def losses(folder: Path) -> list[float]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line and line.endswith("}")]


def wait_for_steps(process: subprocess.Popen, folder: Path, steps: int) -> None:
    while len(losses(folder)) < steps:
        assert process.poll() is None, output(process)
        time.sleep(0.02)


def kill_rank(process: subprocess.Popen, rank: int) -> None:
    for child in psutil.Process(process.pid).children():
        if child.environ().get("RANK") == str(rank):
            child.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pictures"
    for split, count in (("train", 20), ("validation", 4)):
        (folder / split).mkdir(parents=True)
        rows = []
        for i in range(count):
            Image.new("RGB", (30, 30), (9 * i, 200 - 9 * i, 120)).save(folder / split / f"{i}.png")
            words = ["a", "red", "cat", "on", "a", "blue", "ground", "by", "the", "sea"]
            rows.append(json.dumps({"file_name": f"{i}.png", "caption": " ".join(words[: 2 + i % 7])}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def options(pictures) -> list[str]:
    # AdamW: Muon rounds to bfloat16 inside, so that the last bit of a sum over processes shows in all that follows.
    return ["--data", str(pictures), "--steps", str(STEPS), "--batch-size", "7", "--eval-batches", "1", "--eval-every",
            "6", "--save-every", "2", "--dtype", "float32", "--device", "cpu", "--cache", "off", "--optimizer", "adamw",
           ]  # fmt: skip


@pytest.fixture(scope="module")
def never_stopped(options, tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, said = output(launch(1, *options, "--out", folder))
    assert code == 0, said
    return folder


def assert_same_run(folder: Path, other: Path) -> None:
    assert len(losses(folder)) == STEPS
    assert losses(folder) == pytest.approx(losses(other), rel=1e-4)
    one, two = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-4)
    summaries = [json.loads((each / "summary.json").read_text()) for each in (folder, other)]
    assert summaries[0]["captions_seen"] == summaries[1]["captions_seen"]
    assert not (folder / "resume.safetensors").exists()


def test_a_run_goes_on_with_two_one_and_three_processes(never_stopped, options, tmp_path):
    folder = tmp_path / "run"
    process = launch(2, *options, "--out", folder)
    wait_for_steps(process, folder, 3)
    kill_rank(process, 1)
    began = time.time()
    code, said = output(process)
    assert code != 0 and time.time() - began < 60
    assert "train.py --resume" in said and str(folder) in said  # how to go on
    assert said.count("goes on from the last point") == 1
    assert not (folder / "summary.json").exists()

    alone = launch(1, "--resume", folder)
    wait_for_steps(alone, folder, 7)
    alone.kill()
    alone.communicate()

    code, said = output(launch(3, "--resume", folder))
    assert code == 0, said
    assert_same_run(folder, never_stopped)
    assert said.count("trained for") == 1  # one process speaks


def test_torchrun_restarts_a_run_where_it_was_its_frozen_weights_split(never_stopped, options, tmp_path):
    folder = tmp_path / "run"
    shard = ["--shard"] if compat.can_shard() else []
    process = launch(2, *options, *shard, "--out", folder, restarts=1)
    wait_for_steps(process, folder, 5)
    kill_rank(process, 0)
    code, said = output(process)
    assert code == 0, said
    assert_same_run(folder, never_stopped)


def test_an_evaluation_by_two_is_that_of_one(never_stopped):
    results = []
    for processes in (1, 2):
        process = launch(processes, never_stopped, "--n", "4", "--shots", "0", "--device", "cpu", script="evaluate.py")
        code, said = output(process)
        assert code == 0 and said.count(f"wrote {never_stopped}") == 1, said
        results.append(json.loads((never_stopped / "evaluation.json").read_text()))
    one, two = ({k: v for k, v in result.items() if not k.startswith("seconds")} for result in results)
    assert one == two


def test_the_example_of_accelerate_saves_what_trains(pictures, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
               "--main_process_port", "0", str(ROOT / "examples" / "accelerate_loop.py")]  # fmt: skip
    done = subprocess.run(
        [*command, str(pictures), str(tmp_path / "out")], env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 3: loss") == 1
    start, after = (load_file(f / "model.safetensors") for f in (ROOT / "assets/classroom/flamingo", tmp_path / "out"))
    assert start.keys() == after.keys() and not any(start[name].equal(after[name]) for name in start if "to_q" in name)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--batch-size", "1"], "2 processes share 1 example"),
    ],
)
def test_a_mistake_is_said_once_and_all_end(arguments, sentence, tmp_path):
    code, said = output(launch(2, *arguments, "--device", "cpu", "--out", tmp_path / "run"))
    assert code != 0  # torchrun's own, behind whose words its own traceback follows
    ours = said.partition("torch/distributed")[0]
    assert said.count(sentence) == 1 and "Traceback" not in ours and len(ours.splitlines()) < 12, said
    assert set(re.findall(r"exitcode\s*: (-?\d+)", said)) == {"2"}, said
    assert not (tmp_path / "run").exists()


def test_a_run_that_went_well_ends_before_python_is_taken_down(tmp_path):
    """There the threads of gloo would abort it, now and then. What was left for the exit is done, and only that."""
    script = tmp_path / "command.py"
    script.write_text("""
import atexit, os
import torch
from flamingo import ranks

class Held:
    def __del__(self, write=os.write): write(1, b"taken down")

with ranks.joined("command.py"):
    held = Held()
    atexit.register(os.write, 1, b"left for the exit\\n")
    torch.distributed.all_reduce(torch.ones(9))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["left for the exit"] * 2
    script.write_text(script.read_text() + "raise KeyError('ours')\n")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and "KeyError: 'ours'" in done.stderr


def test_a_model_freed_after_the_run_waits_for_no_thread(tmp_path):
    """With it the group was freed, by a process that held Python while it waited for the group's threads; and these
    waited for Python, to let go of the last tensor they had added up. Here a thread has one for sure: it waits for the
    other process, which comes two seconds later."""
    script = tmp_path / "command.py"
    script.write_text("""
import sys, time
from pathlib import Path
import torch
from flamingo import ranks
from flamingo.training import distributed

def work():
    with ranks.joined("command.py"):
        together = distributed.for_training(torch.nn.Linear(2, 2), torch.device("cpu"), shard=False)
        if ranks.is_first():
            torch.distributed.all_reduce(torch.ones(9), async_op=True)
        else:
            time.sleep(2)
            torch.distributed.all_reduce(torch.ones(9))
            Path(sys.argv[1]).touch()

work()
while not Path(sys.argv[1]).exists():
    time.sleep(0.01)
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(tmp_path / "added")], env=environment, check=True, timeout=120)


def test_a_restart_needs_a_name(tmp_path):
    code, said = output(launch(2, "--device", "cpu", restarts=1, cwd=tmp_path))
    assert code != 0 and "name the run folder with --out" in said
