"""What makes training fast or small must not change what is computed."""

import shutil

import pytest
import torch
from conftest import tiny_flamingo

from flamingo import training
from flamingo.errors import InputError
from flamingo.options import parse_training_options


def loss_and_gradients(model, texts, pictures, **options):
    labels = texts.masked_fill(texts < 10, -100)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.pop("bf16", False)):
        loss = model(texts, labels=labels, pixel_values=pictures).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_keeps_less_and_changes_nothing(texts, pictures):
    model = tiny_flamingo()
    loss, gradients = loss_and_gradients(model, texts, pictures)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss_and_gradients(model, texts, pictures)
        without, kept[:] = sum(kept), []
        training.checkpoint_layers(model)
        again, gradients_again = loss_and_gradients(model, texts, pictures)
    assert sum(kept) < 0.8 * without
    assert again == loss and gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient)
    prompt, options = texts[:, :3], {"max_new_tokens": 4, "pixel_values": pictures[:, :1]}
    assert torch.equal(model.generate(prompt, **options), tiny_flamingo().generate(prompt, **options))


@pytest.mark.parametrize("trained", [False, True])
def test_matrices_held_in_bf16_compute_what_autocast_computes(texts, pictures, trained):
    model = tiny_flamingo()
    exact, _ = loss_and_gradients(model, texts, pictures)
    expected, _ = loss_and_gradients(model, texts, pictures, bf16=True)
    training.hold_matrices_in_bf16(model, trained=trained)
    loss, gradients = loss_and_gradients(model, texts, pictures, bf16=True)
    assert loss == expected != exact and loss == pytest.approx(exact, rel=1e-2)
    layer = model.lang_encoder.model.decoder.layers[0]
    assert layer.decoder_layer.fc1.weight.dtype == torch.bfloat16
    assert layer.gated_cross_attn_layer.attn.to_q.weight.dtype == (torch.bfloat16 if trained else torch.float32)
    assert gradients.keys() == model.trainable_state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16):
        held, plain = (
            m.generate(texts[:, :3], pixel_values=pictures[:, :1], max_new_tokens=5) for m in (model, tiny_flamingo())
        )
    assert torch.equal(held, plain)


def test_no_frozen_weight_gets_a_gradient_or_an_optimizer_state(texts, pictures):
    model = tiny_flamingo()
    optimizer = training.make_optimizer(model, parse_training_options([]))
    _, gradients = loss_and_gradients(model, texts, pictures)
    optimizer.step()
    assert gradients.keys() == model.trainable_state_dict().keys()
    assert len(optimizer.state) == len(gradients)


def test_training_keeps_no_keys_and_values_for_a_text_that_is_not_continued(texts, pictures):
    model, caches = tiny_flamingo(), []
    layer = model.lang_encoder.model.decoder.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True)
    model(texts, pixel_values=pictures)
    assert caches == [None]


def test_switches_of_the_command_line():
    options = parse_training_options(["--compile", "--gradient-checkpointing"])
    assert options.compile is True and options.gradient_checkpointing is True
    assert parse_training_options([]).compile is False


def test_compiling_without_a_compiler_is_said(monkeypatch):
    monkeypatch.setattr(training.shutil, "which", lambda name: None)
    monkeypatch.setattr(training.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        training.compile_trained_parts(tiny_flamingo())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_computes_the_same(texts, pictures):
    model = tiny_flamingo()
    loss, gradients = loss_and_gradients(model, texts, pictures)
    training.compile_trained_parts(model, backend="eager")  # captured, not turned into C++, which takes a minute
    again, gradients_again = loss_and_gradients(model, texts, pictures)
    assert again == pytest.approx(loss, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-3, atol=1e-4)
    assert model.trainable_state_dict().keys() == gradients.keys()  # compiling renames nothing
