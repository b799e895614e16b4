"""Muon: what it does to a matrix, which matrices it is for, and that a resumed run goes on with it."""

import copy

import pytest
import torch
from conftest import IMAGE, tiny_flamingo
from test_architectures import tiny_vlm

import train
from flamingo.errors import InputError
from flamingo.run_folder import RESUME_POINT, in_run_folder
from flamingo.training.command_line import parse_training_options
from flamingo.training.log import RunLog
from flamingo.training.muon import MuonAdamW, orthogonal
from flamingo.training.optimizer import make_optimizer


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_every_direction_becomes_about_one_and_stays_the_direction_it_was(shape):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    strengths = torch.logspace(0, -1.5, min(shape))  # the strongest thirty times the weakest
    turned, zero = orthogonal(torch.stack([1e-4 * u @ torch.diag(strengths) @ v, torch.zeros(shape)]))
    along = u.T @ turned @ v.T  # diagonal, if the directions have stayed
    assert along.diagonal().min() > 0.6 and along.diagonal().max() < 1.3
    assert (along - torch.diag(along.diagonal())).abs().max() < 0.1
    assert not zero.any()  # a matrix without gradient is left alone


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_it_steps_as_torchs_muon_and_as_adamw():
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for shape in ((20, 30), (30, 20), (7,))]
    theirs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    start = [parameter.detach().clone() for parameter in ours]
    groups = [{"params": ours[:2], "muon": True}, {"params": ours[2:]}]
    optimizer = MuonAdamW(groups, lr=0.01, weight_decay=0.1)
    muon = torch.optim.Muon(theirs[:2], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[2:], lr=0.01, weight_decay=0.1)
    for _ in range(6):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step(), muon.step(), adamw.step()
    for one, other, begin in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.05 * (other - begin).norm()  # bfloat16 inside
    assert torch.allclose(ours[2], theirs[2])


def groups_of(model, *argv):
    optimizer = make_optimizer(model, parse_training_options([*argv]))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    turned, others = set(), set()
    for group in optimizer.param_groups:
        (turned if group.get("muon") else others).update(names[id(parameter)] for parameter in group["params"])
    return optimizer, turned, others


def test_it_is_for_the_matrices_of_what_is_new_and_for_nothing_else():
    model = tiny_vlm("perceiver", "cross-attention", freeze_language_model=False)
    _, turned, others = groups_of(model, "--optimizer", "muon")
    parameters = dict(model.named_parameters())
    new = {name for name in parameters if name.startswith("perceiver.") or "gated_cross_attn" in name}
    assert turned == {name for name in new if parameters[name].ndim == 2 and not name.endswith(("latents", "_embs"))}
    assert turned and not any("gate" in name.rsplit(".", 1)[-1] for name in turned)
    assert turned | others == {name for name, parameter in parameters.items() if parameter.requires_grad}
    optimizer, turned, _ = groups_of(model, "--optimizer", "adamw")
    assert not turned and type(optimizer) is torch.optim.AdamW


def test_what_trains_moves_as_with_adamw(texts, pictures):
    model = tiny_flamingo()
    before = copy.deepcopy(model.state_dict())
    optimizer, turned, _ = groups_of(model.train(), "--optimizer", "muon")
    model(texts, labels=texts.masked_fill(texts == IMAGE, -100), pixel_values=pictures).loss.backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert turned <= moved <= set(model.trainable_state_dict())


def test_a_run_that_was_stopped_ends_as_one_that_never_was(tmp_path, monkeypatch):
    short = ["--optimizer", "muon", "--steps", "4", "--batch-size", "2", "--eval-batches", "1", "--eval-every", "9",
             "--save-every", "2", "--dtype", "float32", "--device", "cpu", "--seed", "3"]  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run = lambda *argv: in_run_folder(train.main, parse_training_options([*map(str, argv)]))  # noqa: E731
    run(*short, "--out", whole)

    step = RunLog.step

    def stop_at_the_fourth(log, number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        step(log, number, *rest)

    monkeypatch.setattr(RunLog, "step", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(*short, "--out", stopped)
    monkeypatch.undo()
    assert (stopped / RESUME_POINT).exists()
    run("--resume", stopped)
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_an_optimizer_that_there_is_not_is_a_sentence():
    with pytest.raises(InputError, match="--optimizer must be adamw or muon, not 'sgd'"):
        parse_training_options(["--optimizer", "sgd"])
