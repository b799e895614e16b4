"""What makes training fast or small must not change what is computed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FAST, IMAGE, PAD, tiny_flamingo, tiny_lm
from torch import nn
from transformers import OPTForCausalLM

from flamingo.data.batches import point_at_bank
from flamingo.errors import InputError
from flamingo.fast import compiling
from flamingo.fast.checkpointing import checkpoint_layers
from flamingo.fast.chunked_cross_entropy import chunked_cross_entropy
from flamingo.fast.compiling import compile_trained_parts
from flamingo.fast.device import use_plain_attention
from flamingo.fast.enable import enable
from flamingo.fast.inference import prepare_to_generate
from flamingo.fast.onednn import PackedLinear
from flamingo.fast.packing import TextLayout
from flamingo.fast.precision import cast_frozen_to_bf16
from flamingo.interop import compat
from flamingo.model.added_tokens import DecoupledLinear
from flamingo.training.command_line import parse_training_options
from flamingo.training.optimizer import make_optimizer

ROOT = Path(__file__).resolve().parent.parent


def loss_and_gradients(model, texts, pictures, **options):
    """The first text is one token shorter than the others, so that padding is among it."""
    labels, mask = texts.masked_fill(texts < 10, -100), torch.ones_like(texts)
    labels[0, -1], mask[0, -1] = -100, 0
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.pop("bf16", False)):
        loss = model(texts, mask, labels, **{options.get("kind", "pixel_values"): pictures}).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("every", [1, 4])  # 4: one layer of four looks, and the others are checkpointed all the same
def test_gradient_checkpointing_keeps_less_and_changes_nothing(texts, pictures, every):
    def made():
        torch.manual_seed(0)
        return tiny_flamingo(lm=tiny_lm(layers=4), xattn_every=every)

    model = made()
    before, gradients = loss_and_gradients(model, texts, pictures)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss_and_gradients(model, texts, pictures)
        without, kept[:] = sum(kept), []
        checkpoint_layers(model)
        again, gradients_again = loss_and_gradients(model, texts, pictures)
    assert sum(kept) < (0.8 if every == 1 else 0.4) * without
    assert again == before and gradients_again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient)
    prompt, options = texts[:, :3], {"max_new_tokens": 4, "pixel_values": pictures[:, :1]}
    assert torch.equal(model.generate(prompt, **options), made().generate(prompt, **options))


@pytest.mark.parametrize("trained", [False, True])
def test_matrices_held_in_bf16_compute_what_autocast_computes(texts, pictures, trained):
    model = tiny_flamingo()
    features = model.encode_images(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])  # (B, T_img, F, v, d)
    exact, _ = loss_and_gradients(model, texts, features, kind="features")
    expected, _ = loss_and_gradients(model, texts, features, kind="features", bf16=True)
    cast_frozen_to_bf16(model, trained=trained)
    loss, gradients = loss_and_gradients(model, texts, features, kind="features", bf16=True)
    assert loss == expected != exact and loss == pytest.approx(exact, rel=1e-2)
    layer = model.lang_encoder.model.decoder.layers[0]
    assert layer.decoder_layer.fc1.weight.dtype == torch.bfloat16
    assert layer.gated_cross_attn_layer.attn.to_q.weight.dtype == (torch.bfloat16 if trained else torch.float32)
    assert gradients.keys() == model.trainable_state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16):
        held, plain = (
            m.generate(texts[:, :3], features=features[:, :1], max_new_tokens=5) for m in (model, tiny_flamingo())
        )
    assert torch.equal(held, plain)


def test_the_frozen_encoder_is_bf16_throughout_when_it_is_held_so(texts, pictures):
    """Never under autocast, which would convert its weights at every call."""
    model = tiny_flamingo()
    exact = model.encode_images(pictures.flatten(0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode_images(pictures.flatten(0, 1)), exact)
        cast_frozen_to_bf16(model)
        low = model.encode_images(pictures.flatten(0, 1))
    assert low.dtype == torch.bfloat16 and {p.dtype for p in model.vision_encoder.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(low.float(), exact, atol=0.1, rtol=0.05)


def test_what_stays_in_float32_does_not_hold_the_file_it_was_read_from(texts):
    """One view of a mapped file keeps all of it in memory, half a gigabyte of a language model that is bfloat16 now."""
    model = tiny_flamingo()
    for parameter in model.lang_encoder.parameters():  # as if each were read from one file
        if not parameter.requires_grad:
            file = torch.zeros(parameter.numel() + 1000)
            parameter.data = file[1000:].view_as(parameter).copy_(parameter.data)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(texts, blind=True).logits
        cast_frozen_to_bf16(model)
        after = model(texts, blind=True).logits
    assert torch.equal(after, before)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.untyped_storage().nbytes() == parameter.nbytes, name


def test_plain_attention_computes_the_same(texts, pictures):
    expected, gradients = loss_and_gradients(tiny_flamingo(), texts, pictures)
    flash = torch.backends.cuda.flash_sdp_enabled()
    use_plain_attention(torch.device("cpu"))
    try:
        assert not torch.backends.cuda.flash_sdp_enabled()
        loss, others = loss_and_gradients(tiny_flamingo(), texts, pictures)
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-3)


# ------------------------------------------------------------------------- each piece alone, and all together: plain
PIECES = [("grouped",), ("chunked",), ("chunked", "packed"), FAST]


@pytest.mark.parametrize("fast", PIECES, ids="+".join)
@pytest.mark.parametrize("every", [1, 2])
def test_a_piece_changes_neither_loss_nor_gradient_nor_caption(texts, pictures, fast, every):
    plain, quick = (tiny_flamingo(fast=pieces, xattn_every=every) for pieces in ((), fast))
    expected, gradients = loss_and_gradients(plain, texts, pictures)
    loss, others = loss_and_gradients(quick, texts, pictures)
    assert loss == pytest.approx(expected, rel=1e-5) and others.keys() == gradients.keys()
    torch.testing.assert_close(others, gradients, atol=1e-6, rtol=1e-3)
    prompt, options = texts[:, :3], {"max_new_tokens": 6, "min_new_tokens": 6, "pixel_values": pictures[:, :1]}
    for how in ({}, {"num_beams": 3}):
        assert torch.equal(quick.generate(prompt, **options, **how), plain.generate(prompt, **options, **how))


@pytest.mark.parametrize("fast", PIECES, ids="+".join)
def test_captions_of_a_picture_are_read_together_as_apart(pictures, fast):
    """Four texts of unequal length, two to each picture, pointed at by an index or by their order."""
    model, bank = tiny_flamingo(fast=fast), pictures[:, 0]  # (N, F, C, H, W)
    rows = [[2, IMAGE, *range(11, 11 + length)] for length in (1, 5, 3, 2)]
    ids = torch.tensor([row + [PAD] * (7 - len(row)) for row in rows])
    mask, index = (ids != PAD).long(), torch.tensor([[0], [0], [1], [1]])
    labels = ids.masked_fill((ids < 10) | (ids == IMAGE), -100)
    total = 0.0
    for i, row in enumerate(rows):
        text, label = ids[i : i + 1, : len(row)], labels[i : i + 1, : len(row)]
        total += model(text, labels=label, pixel_values=bank, image_index=index[i : i + 1]).loss * (len(row) - 2)
    for pointed_at in ({"image_index": index}, {"texts_per_image": 2}):
        loss = model(ids, mask, labels, pixel_values=bank, **pointed_at).loss
        assert loss.item() == pytest.approx(total.item() / 11, rel=1e-5)
        layout = TextLayout.of(labels, mask)
        if "chunked" in fast:  # made beforehand, as data/batches.py does
            torch.testing.assert_close(
                model(ids, mask, labels, pixel_values=bank, **pointed_at, layout=layout).loss, loss
            )


def test_texts_that_cannot_be_packed_are_read_padded(texts, pictures):
    model, widths = tiny_flamingo(fast=FAST), []
    layer = model.lang_encoder._get_decoder_layers()[0]
    layer.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape[:2])))
    mask = torch.ones_like(texts)
    mask[0, -1] = 0
    labels = texts.masked_fill(texts < 10, -100)
    for which in (mask, torch.ones_like(texts), mask.flip(1)):  # padded on the right; not at all; on the left
        model(texts, which, labels, pixel_values=pictures)
    assert widths == [(1, 17), (2, 9), (2, 9)]


def test_only_what_a_language_model_allows_is_installed():
    chosen = lambda lm: enable(tiny_flamingo(lm=lm))  # noqa: E731
    assert chosen(tiny_lm()) == ["grouped", "chunked", "packed"]
    other = tiny_lm()
    other.set_attn_implementation("eager")
    assert chosen(other) == ["grouped", "chunked"]  # an attention that was chosen is kept
    scaled = tiny_lm()
    scaled.__class__ = ScaledOPT
    assert chosen(scaled) == ["grouped"]


class ScaledOPT(OPTForCausalLM):
    """Something follows its head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_a_fast_piece_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr("flamingo.fast.packing.TextLayout.unpack", lambda self, x: x[0, : self.shape[1]].expand(
        self.shape[0], *x[0, : self.shape[1]].shape))  # fmt: skip
    with pytest.raises(InputError, match=r"transformers .* computes another loss by flamingo/fast .* --plain"):
        enable(tiny_flamingo())


def test_the_chunked_loss_is_the_loss_of_all_logits(monkeypatch):
    """Gradients too, of what trains: the two added rows, or the whole head."""
    for whole in (False, True):
        torch.manual_seed(0)
        head = DecoupledLinear(nn.Linear(6, 20, bias=False).requires_grad_(whole), 18, 2)
        hidden, targets = torch.randn(7, 6, requires_grad=True), torch.tensor([3, 19, 7, 18, 0, 5, 19])
        inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
        expected = F.cross_entropy(head(hidden), targets)
        gradients = torch.autograd.grad(2 * expected, inputs)
        monkeypatch.setattr("flamingo.fast.chunked_cross_entropy.LOGITS_AT_ONCE", 60)  # three rows, one at last
        sizes = []
        head.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(len(args[0])))
        chunked = chunked_cross_entropy(head, hidden, targets)
        assert sizes == [3, 3, 1]
        torch.testing.assert_close(chunked, expected)
        torch.testing.assert_close(torch.autograd.grad(2 * chunked, inputs), gradients)
        with torch.no_grad():
            torch.testing.assert_close(chunked_cross_entropy(head, hidden, targets), expected)


@pytest.mark.parametrize(
    ("rows", "each"),
    [([[0]], 1), ([[0], [1]], 1), ([[0], [0], [0]], 3), ([[0], [0], [1], [1]], 2), ([[0], [1], [1]], None),
     ([[1], [0]], None), ([[0, 1]], None), ([[0], [0], [2], [2]], None), ([[0], []], None)],
)  # fmt: skip
def test_when_captions_of_a_picture_stand_side_by_side(rows, each):
    pictures = max(max(row, default=0) for row in rows) + 1
    found = point_at_bank(rows, pictures)
    assert found.get("texts_per_image") == each
    if each is None:
        assert found["image_index"].shape[0] == len(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_prepared_to_generate_says_the_same(texts, pictures, dtype):
    model, prompt = tiny_flamingo(), texts[:, :3]

    def said():
        logits = model(texts, pixel_values=pictures).logits
        some = model.generate(prompt, pixel_values=pictures[:, :1])
        return logits, some, model.generate(prompt[:1], pixel_values=pictures[:1, :1])  # one text: other products

    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        expected = said()
        prepare_to_generate(model, dtype)
        got = said()
    assert isinstance(model.lang_encoder.model.decoder.layers[0].decoder_layer.fc1, PackedLinear)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(got[0], expected[0], **close)
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])


@pytest.mark.parametrize("enabled", [True, False])
def test_a_product_with_one_vector_does_without_onednn(enabled, monkeypatch):
    linear = torch.nn.Linear(64, 48).to(torch.bfloat16)
    packed, x, seen = PackedLinear(linear, keep_rows=True), torch.randn(2, 1, 64).to(torch.bfloat16), []

    def spy(*args):
        seen.append(torch.backends.mkldnn.enabled)
        return linear_function(*args)

    linear_function = F.linear
    monkeypatch.setattr(F, "linear", spy)
    before = torch.backends.mkldnn.enabled
    try:
        torch.backends.mkldnn.enabled = enabled
        one_by_one = torch.cat([packed(x[:1]), packed(x[1:])])
        assert seen == [False, False] and torch.backends.mkldnn.enabled is enabled  # as it was
    finally:
        torch.backends.mkldnn.enabled = before
    torch.testing.assert_close(packed(x), one_by_one, atol=0.02, rtol=0.02)
    assert len(seen) == 2


def test_no_frozen_weight_gets_a_gradient_or_an_optimizer_state(texts, pictures):
    model = tiny_flamingo()
    optimizer = make_optimizer(model, parse_training_options([]))
    _, gradients = loss_and_gradients(model, texts, pictures)
    optimizer.step()
    assert gradients.keys() == model.trainable_state_dict().keys()
    assert len(optimizer.state) == len(gradients)


def test_training_keeps_no_keys_and_values_for_a_text_that_is_not_continued(texts, pictures):
    model, caches = tiny_flamingo(), []
    layer = model.lang_encoder.model.decoder.layers[0]
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: caches.append(compat.find_cache(kwargs.values())), with_kwargs=True
    )
    model(texts, pixel_values=pictures)
    assert caches == [None]


def test_switches_of_the_command_line():
    options = parse_training_options(["--compile", "--gradient-checkpointing"])
    assert options.compile is True and options.gradient_checkpointing is True
    assert parse_training_options([]).compile is False


def test_compiling_without_a_compiler_is_said(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiling.torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        compile_trained_parts(tiny_flamingo())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_computes_the_same(texts, pictures):
    model = tiny_flamingo()
    loss, gradients = loss_and_gradients(model, texts, pictures)
    compile_trained_parts(model, backend="eager")  # captured, not turned into C++, which takes a minute
    again, gradients_again = loss_and_gradients(model, texts, pictures)
    assert again == pytest.approx(loss, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-3, atol=1e-4)
    assert model.trainable_state_dict().keys() == gradients.keys()  # compiling renames nothing


SHAPES = """
import sys
import torch
from flamingo.fast import device

if sys.argv[1] == "tuned":
    device.tune(torch.device("cpu"))
held = lambda: int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1e3
linear, x = torch.nn.Linear(192, 192).bfloat16(), torch.randn(1000, 192).bfloat16()
linear(x[:1])
before = held()
for rows in range(10, 410):
    linear(x[:rows])
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_products_of_many_shapes_do_not_fill_the_memory():
    """No two batches of a run are alike, and oneDNN has a plan of its own for each shape."""
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}

    def megabytes(how: str) -> float:
        command = [sys.executable, "-c", SHAPES, how]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout)

    usual = megabytes("as it is")
    if usual < 100:
        pytest.skip(f"this torch keeps no plans on this CPU ({usual:.0f} MB after 400 shapes)")
    assert megabytes("tuned") < 0.4 * usual
