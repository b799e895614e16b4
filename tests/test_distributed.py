"""Several processes make the step that one makes: gradients, losses, frozen weights in pieces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent / "others"))
import several_processes as program

from flamingo import ranks
from flamingo.config import TrainingOptions
from flamingo.errors import InputError
from flamingo.fast import device
from flamingo.interop import compat
from flamingo.training import distributed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", params=[2, 3])
def together(request, tmp_path_factory):
    """(processes, gradients by case, facts by case)."""
    out = tmp_path_factory.mktemp("together")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param),
         program.__file__, str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, check=True, timeout=300,
    )  # fmt: skip
    return request.param, load_file(out / "gradients.safetensors"), json.loads((out / "facts.json").read_text())


def test_gradients_losses_and_texts_are_those_of_one_process(together):
    _, gradients, facts = together
    for case in program.CASES:
        model = program.model_of(case)
        loss = program.step(model, model).item()
        alone = program.gradients(model)
        assert alone
        for how in ("copied", "sharded") if compat.can_shard() else ("copied",):
            title = f"{case} {how}"
            assert facts[title]["loss"] == pytest.approx(loss, abs=1e-6)
            assert facts[title]["generated"] == program.generated(model)
            assert {name for name in gradients if name.startswith(f"{title} ")} == {f"{title} {n}" for n in alone}
            for name, gradient in alone.items():
                torch.testing.assert_close(gradients[f"{title} {name}"], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not compat.can_shard(), reason="--shard needs torch 2.7")
def test_sharded_each_process_keeps_its_part_of_what_is_frozen(together):
    processes, _, facts = together
    for case in program.CASES:
        whole, own = (facts[f"{case} {how}"]["own_bytes"] for how in ("copied", "sharded"))
        assert own < 1.35 * whole / processes  # tensors of few rows do not divide evenly


def test_alone_nothing_is_wrapped():
    model = program.model_of("plain")
    assert distributed.for_training(model, torch.device("cpu"), shard=False) is model
    assert ranks.share([1, 2, 3]) == [1, 2, 3] and ranks.total(2, 3) == [2, 3]


@pytest.mark.parametrize(
    "processes, batch, examples, options, sentence",
    [
        (1, 8, 100, {"shard": True}, "start several, with torchrun"),
        (3, 2, 100, {}, "3 processes share 2 example"),
        (3, 8, 2, {}, "start at most 2"),
    ],
)
def test_what_several_processes_cannot_do_is_said(monkeypatch, processes, batch, examples, options, sentence):
    monkeypatch.setattr(ranks, "_count", processes)
    with pytest.raises(InputError, match=sentence):
        distributed.check(TrainingOptions(batch_size=batch, **options), [range(examples)])


@pytest.mark.skipif(not compat.can_shard(), reason="--shard needs torch 2.7")
def test_a_language_model_that_trains_is_not_split(monkeypatch):
    model = program.model_of("plain")
    model.train_language_model(True)
    monkeypatch.setattr(ranks, "_count", 2)
    with pytest.raises(InputError, match="this language model trains: leave --shard out"):
        distributed.for_training(model, torch.device("cpu"), shard=True)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(ranks, "_count", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"4 processes on a machine with 1 GPU\(s\): give --nproc-per-node 1"):
        device.pick_device("cuda")
