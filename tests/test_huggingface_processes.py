"""A FlamingoModel in several processes, and in a fresh one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flamingo.files import asset

pytest.importorskip("accelerate", reason="the Trainer needs accelerate: pip install accelerate")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = asset("classroom/flamingo")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def python(*arguments) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's rendezvous is tried on Linux and macOS")
def test_two_processes_train_as_one_does(tmp_path):
    """Four texts in each of two processes, and eight in one: the same losses, and the same weights written once."""
    script = ROOT / "tests" / "others" / "train_in_processes.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    found = [python(*launch, script, tmp_path / "two", 4), python(script, tmp_path / "one", 8)]
    losses = [
        [float(word) for word in line.split()[1:]] for out in found for line in out.splitlines() if "losses" in line
    ]
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    two, one = (load_file(tmp_path / name / "checkpoint-2" / "model.safetensors") for name in ("two", "one"))
    begin = load_file(FOLDER / "model.safetensors")
    assert two.keys() == one.keys() == begin.keys()
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], atol=1e-3, rtol=1e-2)
        assert not torch.equal(tensor, begin[name]), name


def test_the_auto_classes_know_a_flamingo_in_a_fresh_process_that_has_imported_it(tmp_path):
    code = """
import sys
from flamingo import FlamingoModel
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
folder, out = sys.argv[1:]
assert type(AutoConfig.from_pretrained(folder)).__name__ == "FlamingoConfig"
assert type(AutoProcessor.from_pretrained(folder)).__name__ == "FlamingoProcessor"
for kind in (AutoModel, AutoModelForImageTextToText):
    model = kind.from_pretrained(folder)
    assert type(model).__name__ == "FlamingoModel"
model.save_pretrained(out, safe_serialization=True)
again = AutoModel.from_pretrained(out)
assert all((a == b).all() for a, b in zip(model.state_dict().values(), again.state_dict().values()))
"""
    python("-c", code, FOLDER, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file() and not list((tmp_path / "out").glob("*.bin"))
