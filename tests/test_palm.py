"""PaLM, and Flamingo-PaLM as flamingo-pytorch's README calls it."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flamingo import FlamingoPaLM, InputError
from flamingo.config import TrainingOptions
from flamingo.interop.backbones import build_flamingo, load_tokenizer, load_vision_encoder
from flamingo.interop.flamingo_pytorch import GatedCrossAttentionBlock, PerceiverResampler
from flamingo.model.palm import PaLMConfig, PaLMForCausalLM, causal_mask
from flamingo.presets import model_config
from flamingo.run_folder import new
from flamingo.training.checkpoint import load_model
from flamingo.training.command_line import parse_training_options
from flamingo.training.text import TOKENIZER, rows_of, train_on_text


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def palm() -> PaLMForCausalLM:
    torch.manual_seed(0)
    config = PaLMConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    return PaLMForCausalLM(config).eval()


class Patches(nn.Module):
    """(N, 3, 16, 16) → (N, 4, dim)."""

    def __init__(self, dim: int, size: int = 8):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, size, stride=size)

    def forward(self, images):
        return self.patch(images).flatten(2).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------- the PaLM
def test_a_layer_is_the_papers_formula(palm):
    layer, x = palm.model.layers[0], torch.randn(1, 3, 32)
    normed = layer.norm(x)
    positions = torch.arange(3)[None]
    mask = torch.ones(1, 1, 3, 3).tril().bool()
    q = layer.to_q(normed).view(3, 4, 8)
    k, v = layer.to_kv(normed)[0].split(8, dim=-1)
    angle = positions[0, :, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)  # (3, 4)

    def turned(y):  # (…, 8) at three positions, as complex numbers
        z = torch.complex(y[..., :4], y[..., 4:])
        z = z * torch.polar(torch.ones_like(angle), angle).view(3, *[1] * (y.ndim - 2), 4)
        return torch.cat([z.real, z.imag], dim=-1)

    q, k, out = turned(q), turned(k), []
    for head in range(4):
        scores = (q[:, head] @ k.T / 8**0.5).masked_fill(~mask[0, 0], -torch.inf)
        out.append(scores.softmax(-1) @ v)
    a, b = layer.ff_in(normed).chunk(2, dim=-1)
    by_hand = x + layer.to_out(torch.cat(out, dim=-1)) + layer.ff_out(torch.nn.functional.silu(a) * b)
    close(layer(x, palm.model.turn(positions), mask, None), by_hand)


def test_no_biases_one_head_of_keys_and_tied_embeddings(palm):
    assert not [name for name, _ in palm.named_parameters() if name.endswith("bias")]
    assert palm.model.layers[0].to_kv.out_features == 2 * 8
    assert palm.lm_head.weight is palm.model.embed_tokens.weight


def test_only_distances_matter(palm):
    ids = torch.randint(0, 50, (1, 6))
    moved = palm(ids, position_ids=torch.arange(100, 106)[None]).logits
    torch.testing.assert_close(palm(ids).logits, moved, rtol=1e-3, atol=1e-4)


def test_cached_steps_left_padding_and_beams(palm):
    ids = torch.randint(4, 50, (2, 5))
    expected = ids
    for _ in range(4):
        expected = torch.cat([expected, palm(expected).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(palm.generate(ids, **options), expected)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
    assert torch.equal(palm.generate(padded, attention_mask=mask, **options)[:, 3:], expected)
    assert palm.generate(ids, num_beams=3, **options).shape == (2, 9)


def test_hidden_states_tuples_and_what_would_be_ignored(palm):
    ids = torch.randint(0, 50, (2, 6))
    output = palm(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and torch.equal(output.hidden_states[0], palm.model.embed_tokens(ids))
    assert torch.equal(palm.lm_head(output.hidden_states[-1]), output.logits)
    close(palm.model.norm(palm.model.layers[1](
        output.hidden_states[1], palm.model.turn(torch.arange(6)[None]), causal_mask(torch.ones(2, 6), 6), None
    )), output.hidden_states[2])  # fmt: skip
    assert palm(ids).hidden_states is None
    assert torch.equal(palm(ids, labels=ids, return_dict=False)[1], output.logits)
    for ignored in ({"output_attentions": True}, {"token_type_ids": ids}, {"past": 1}):
        with pytest.raises(ValueError, match=f"does nothing with {next(iter(ignored))}="):
            palm(ids, **ignored)


def test_it_saves_loads_and_learns(palm, tmp_path):
    palm.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 50, (2, 6))
    assert type(again) is PaLMForCausalLM and torch.equal(again(ids).logits, palm(ids).logits)
    optimizer = torch.optim.AdamW(palm.parameters(), lr=1e-2)
    first = palm(ids, labels=ids).loss.item()
    for _ in range(30):
        optimizer.zero_grad()
        palm(ids, labels=ids).loss.backward()
        optimizer.step()
    assert palm(ids, labels=ids).loss.item() < 0.1 * first


@pytest.mark.parametrize("fusion", ["cross-attention", "language-stream"])
def test_it_becomes_a_flamingo_like_any_language_model(palm, fusion):
    from conftest import IMAGE
    from test_architectures import tiny_vlm

    model = tiny_vlm("perceiver", fusion, lm=palm, fast=True)
    from flamingo.interop.selfcheck import check_decoding

    assert check_decoding(model) < 1e-3
    ids, picture = torch.tensor([[2, IMAGE, 11]]), torch.randn(1, 1, 1, 3, 8, 8)
    assert not torch.allclose(model(ids, pixel_values=picture).logits, model(ids, pixel_values=-picture).logits)


# --------------------------------------------------------------------------- flamingo-pytorch's README, as it stands
def test_the_resampler_of_the_readme():
    perceive = PerceiverResampler(
        dim = 1024,
        depth = 2,
        dim_head = 64,
        heads = 8,
        num_latents = 64,
        num_time_embeds = 4
    )  # fmt: skip

    medias = torch.randn(1, 2, 256, 1024)
    perceived = perceive(medias)
    assert perceived.shape == (1, 2, 64, 1024)
    assert perceive(medias[:, 0]).shape == (1, 1, 64, 1024)
    with pytest.raises(ValueError, match="5 pictures, but num_time_embeds is 4"):
        perceive(torch.randn(1, 5, 2, 1024))


def test_the_block_of_the_readme():
    torch.manual_seed(0)
    cross_attn = GatedCrossAttentionBlock(
        dim = 1024,
        dim_head = 64,
        heads = 8
    )  # fmt: skip

    text = torch.randn(1, 512, 1024)
    perceived = torch.randn(1, 2, 64, 1024)

    time_mask = torch.ones((1, 2)).bool()
    media_locations = torch.randint(0, 2, (1, 512)).bool()

    out = cross_attn(
        text,
        perceived,
        time_mask = time_mask,
        media_locations = media_locations
    )  # fmt: skip
    assert torch.equal(out, text)  # the gates are shut
    with torch.no_grad():
        cross_attn.attn_gate.fill_(1.0)
    changed = (cross_attn(text, perceived, time_mask=time_mask, media_locations=media_locations) != text).any(-1)[0]
    time = media_locations[0].cumsum(0)
    assert torch.equal(changed, (time == 1) | (time == 2))  # of the third picture there is none
    time_mask[0, 1] = False
    changed = (cross_attn(text, perceived, time_mask=time_mask, media_locations=media_locations) != text).any(-1)[0]
    assert torch.equal(changed, time == 1)


def test_flamingo_palm_of_the_readme():
    """With its arguments; vocabulary, picture and layers are smaller than its own, so that it takes a blink."""
    torch.manual_seed(0)
    flamingo_palm = FlamingoPaLM(
        num_tokens = 200,
        dim = 32,
        depth = 6,
        heads = 4,
        dim_head = 8,
        img_encoder = Patches(32),
        media_token_id = 3,
        cross_attn_every = 3,
        perceiver_num_latents = 5,
        perceiver_depth = 2
    )  # fmt: skip

    text = torch.randint(4, 200, (2, 12))
    text[:, 1], text[0, 6] = 3, 3  # two pictures, and one

    palm_logits = flamingo_palm(text)
    assert palm_logits.shape == (2, 12, 200)

    images = torch.randn(2, 2, 3, 16, 16)
    time_mask = torch.tensor([[True, True], [True, False]])

    flamingo_logits = flamingo_palm(text, images, time_mask = time_mask)  # fmt: skip
    assert torch.equal(flamingo_logits, palm_logits)  # the gates are shut

    with torch.no_grad():
        for layer in flamingo_palm.lm._get_decoder_layers():
            layer.gated_cross_attn_layer.attn_gate.fill_(1.0)
    assert len(flamingo_palm.lm._get_decoder_layers()) == 2
    assert torch.equal(flamingo_palm(text), palm_logits)  # text alone is the PaLM, whatever was trained
    logits = flamingo_palm(text, images, time_mask=time_mask)
    assert not torch.allclose(logits, palm_logits)
    embeds = flamingo_palm.img_encoder(images.flatten(0, 1)).unflatten(0, (2, 2))
    close(flamingo_palm(text, embeds=embeds, time_mask=time_mask), logits)
    other = images.clone()
    other[1, 1] += 1  # masked: nobody sees it
    close(flamingo_palm(text, other, time_mask=time_mask), logits)
    with pytest.raises(ValueError, match="text 1 has 2 <image> tokens but 1 pictures"):
        flamingo_palm(text.index_put((torch.tensor(1), torch.tensor(6)), torch.tensor(3)), images, time_mask=time_mask)
    with pytest.raises(ValueError, match="give images or embeds"):
        flamingo_palm(text, images, embeds=embeds)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_what_trains_is_decided_in_one_place(end_to_end):
    shape = {"num_tokens": 50, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, "perceiver_num_latents": 3}
    model = FlamingoPaLM(**shape, cross_attn_every=1, img_encoder=Patches(16))
    assert all(p.requires_grad for p in model.parameters())
    text = torch.randint(4, 50, (1, 5))
    model.train_pictures_only(img_encoder=end_to_end)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model(text), model(text.index_fill(1, torch.tensor([0]), 3), torch.randn(1, 1, 3, 16, 16))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before  # a call changes nothing
    for name, trains in before.items():
        new = name.startswith("perceiver.") or "gated_cross_attn_layer" in name
        assert trains == (new or (end_to_end and name.startswith("img_encoder."))), name


def test_without_an_encoder_images_are_refused():
    model = FlamingoPaLM(num_tokens=50, dim=16, depth=1, heads=2, dim_head=8)
    with pytest.raises(ValueError, match="there is no img_encoder"):
        model(torch.tensor([[3, 5]]), torch.randn(1, 1, 3, 16, 16))


SMALL = {"num_tokens": 50, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8, "perceiver_num_latents": 3}


@pytest.mark.parametrize("time_mask, message", [
    ([[False, True]], "has a hole"), ([[True, True, True]], r"must be \(1, 2\)"), ([True, True], r"must be \(1, 2\)"),
])  # fmt: skip
def test_a_time_mask_that_says_nothing_certain_is_refused(time_mask, message):
    model = FlamingoPaLM(**SMALL, cross_attn_every=1)
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[3, 5, 6]]), embeds=torch.randn(1, 2, 4, 16), time_mask=torch.tensor(time_mask))


@pytest.mark.parametrize("pooled", [lambda x: x.mean(dim=1), lambda x: x[..., :8], lambda x: (x, x)])
def test_an_encoder_that_gives_no_patch_embeddings_is_refused(pooled):
    class Pooled(Patches):
        def forward(self, images):
            return pooled(super().forward(images))

    model = FlamingoPaLM(**SMALL, cross_attn_every=1, img_encoder=Pooled(16))
    with pytest.raises(ValueError, match=r"must give patch embeddings \(N, v, 16\)"):
        model(torch.tensor([[3, 5, 6]]), torch.randn(1, 1, 3, 16, 16))


def test_one_of_our_encoders_is_trained_end_to_end_if_asked_and_else_stays_as_it_was():
    encoder = load_vision_encoder("asset:classroom/clip")
    model = FlamingoPaLM(**SMALL | {"dim": encoder.dim}, cross_attn_every=1, img_encoder=encoder)
    with torch.no_grad():
        model.lm._get_decoder_layers()[0].gated_cross_attn_layer.attn_gate.fill_(1.0)
    text, pictures = torch.tensor([[3, 5, 6]]), torch.randn(1, 1, 3, *encoder.image_size)
    for end_to_end in (True, False):
        model.train_pictures_only(img_encoder=end_to_end).zero_grad()
        model(text, pictures).sum().backward()
        moved = [p.grad is not None and bool(p.grad.any()) for p in encoder.parameters()]
        assert sum(moved) > len(moved) / 2 if end_to_end else not any(moved)


def test_a_frozen_encoder_has_no_dropout_and_learns_no_statistics():
    encoder = nn.Sequential(nn.Dropout(0.5), Patches(16), nn.BatchNorm1d(4))
    model = FlamingoPaLM(**SMALL, cross_attn_every=1, img_encoder=encoder).train()
    text, pictures = torch.tensor([[3, 5, 6]]), torch.randn(1, 2, 3, 16, 16)
    assert encoder[0].training  # it trains
    model.train_pictures_only().train()
    before = encoder[2].running_mean.clone()
    features = [model._encode(pictures) for _ in range(2)]
    assert model.training and torch.equal(*features) and torch.equal(encoder[2].running_mean, before)
    assert model(text, pictures).requires_grad
    assert model.train_pictures_only(img_encoder=True).img_encoder[0].training


# ------------------------------------------------------------------------------------------------ trained by train.py
def test_a_palm_is_trained_on_a_text_file_and_becomes_a_flamingo(tmp_path):
    book, out = tmp_path / "book.txt", tmp_path / "palm"
    book.write_text("the cat sat on the mat and the dog lay on the rug\n" * 120)
    given = ["--preset", "palm-text", "--batch-size", "4", "--max-tokens", "16", "--device", "cpu", "--data", str(book)]
    options = parse_training_options([*given, "--steps", "6", "--warmup-steps", "1", "--eval-every", "3"])
    with new(out):
        train_on_text(options, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["val_loss"] < lines[2]["val_loss"] and len(lines) == 6
    assert json.loads((out / "summary.json").read_text())["steps"] == 6
    built = build_flamingo(model_config(parse_training_options(["--lm", str(out)])))
    assert type(built.model.lang_encoder).__name__ == "FlamingoPaLMForCausalLM" and len(built.model.gates()) == 2
    with pytest.raises(InputError, match="describes a 'palm', not a flamingo"):
        load_model(out)
    with pytest.raises(InputError, match=r"cannot load the vision encoder .*: it is a model of the kind 'palm', not a"):
        load_vision_encoder(str(out))
    with pytest.raises(InputError, match="finished"):
        parse_training_options(["--resume", str(out)])


@pytest.mark.parametrize("text, options, message", [
    ("short", [], "is too short"),
    (None, [], "cannot be read as a text file"),
    ("a text", ["--set", "fusion.heads=2"], "--set does nothing with --preset palm-text"),
    ("a text", ["--plain"], "--plain does nothing"),
    ("a text", ["--patience", "2"], "--patience does nothing"),
    ("a text", ["--gate-lr", "0.1"], "--gate-lr does nothing"),
    ("a text", ["--skip-bad-steps", "3"], "--skip-bad-steps does nothing"),
    ("a text", ["--lm", "./nothing"], "cannot load the tokenizer of ./nothing: there is no folder"),
])  # fmt: skip
def test_mistakes_in_a_text_run(tmp_path, text, options, message):
    book = tmp_path / "book.txt"
    if text:
        book.write_text(text)
    with pytest.raises(InputError, match=message):
        train_on_text(parse_training_options(["--preset", "palm-text", "--data", str(book), *options]), tmp_path)


def test_every_held_out_token_counts_the_same(palm):
    """Nine rows are read as eight and one."""
    from flamingo.training.text import validate

    rows = torch.randint(3, 40, (9, 12), generator=torch.Generator().manual_seed(0))
    palm.eval()
    each = [palm(row[None], labels=row[None]).loss.item() for row in rows]
    assert validate(palm, rows, torch.device("cpu"), "float32") == pytest.approx(sum(each) / 9, rel=1e-5)


def test_rows_of_documents_are_full_and_a_function_of_the_seed():
    tokenizer = load_tokenizer(TOKENIZER)
    options = TrainingOptions(preset="palm-text", batch_size=3, max_tokens=40, seed=5)
    (train, held_out), (again, _) = rows_of(options, tokenizer), rows_of(options, tokenizer)
    batch = next(train)
    assert batch.shape == (3, 40) and held_out.shape[1] == 40 and torch.equal(batch, next(again))
    assert not (batch == tokenizer.pad_token_id).any()
