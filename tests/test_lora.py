"""LoRA as part of an architecture: `--set language.lora_rank=4`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_resume import start, start_and_kill

from flamingo import FlamingoConfig, FlamingoModel, FlamingoProcessor, InputError
from flamingo.classroom import scenes
from flamingo.fast.enable import enable
from flamingo.interop.backbones import build_flamingo
from flamingo.presets import model_config
from flamingo.training.checkpoint import load_model
from flamingo.training.command_line import parse_training_options
from flamingo.training.optimizer import make_optimizer

peft = pytest.importorskip("peft")

LORA = ["--preset", "classroom-llava", "--set", "language.lora_rank=4", "--set", "language.lora_dropout=0.3"]
SHORT = [*LORA, "--lm-lr", "0.01", "--steps", "4", "--batch-size", "4", "--eval-batches", "1", "--save-every", "1",
         "--dtype", "bfloat16", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert start(folder, *SHORT).wait() == 0
    return folder


@pytest.mark.parametrize("preset", ["classroom", "classroom-llava"])
def test_it_begins_as_the_model_without_and_has_a_learning_rate_of_its_own(preset):
    options = parse_training_options(["--preset", preset, "--set", "language.lora_rank=4", "--lm-lr", "0.007"])
    torch.manual_seed(0)
    plain = build_flamingo(model_config(parse_training_options(["--preset", preset]))).model.eval()
    torch.manual_seed(0)
    model = build_flamingo(model_config(options)).model.eval()
    ids = torch.tensor([[2, model.media_token_id, 11, 12, 13]])
    pixels = torch.randn(1, 1, 1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(model(ids, pixel_values=pixels).logits, plain(ids, pixel_values=pixels).logits)
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(lora) == 4 * 6 * 2  # four layers, six matrices, two factors; none in the cross-attention
    assert not any("gated_cross_attn" in name for name in lora) and all(p.requires_grad for p in lora.values())
    rates = {id(p): group["lr"] for group in make_optimizer(model, options).param_groups for p in group["params"]}
    assert {rates[id(p)] for p in lora.values()} == {0.007}
    assert len(rates) == sum(p.requires_grad for p in model.parameters())


def test_it_is_trained_saved_and_loaded_and_what_is_frozen_stays(trained):
    tensors = load_file(trained / "model.safetensors")
    lora = {name: tensor for name, tensor in tensors.items() if "lora_B" in name}
    assert lora and all(tensor.any() for tensor in lora.values())  # they began at 0
    assert not any("base_layer" in name for name in tensors)
    assert json.loads((trained / "config.json").read_text())["lm_lora_rank"] == 4
    fresh = build_flamingo(model_config(parse_training_options(["--preset", "classroom-llava"]))).model
    own = dict(fresh.lang_encoder.named_parameters())
    for name, parameter in load_model(trained).model.lang_encoder.named_parameters():
        if "base_layer" in name:
            assert torch.equal(parameter, own[name.replace(".base_layer", "")]), name
    model, processor = FlamingoModel.from_pretrained(trained), FlamingoProcessor.from_pretrained(trained)
    inputs = processor(images=[scenes.make_scene(0, "test", 0).draw()], text=["<image> a"])
    with_lora = model(**inputs).logits
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert not torch.equal(model(**inputs).logits, with_lora)


def test_killed_and_resumed_it_ends_the_same_with_dropout_too(trained, tmp_path):
    folder = tmp_path / "run"
    start_and_kill(folder, 2, *SHORT)
    assert start(folder, "--resume").wait() == 0
    one, other = load_file(trained / "model.safetensors"), load_file(folder / "model.safetensors")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_dropout_acts_while_it_trains_and_then_alone(trained):
    model = load_model(trained).model
    ids = torch.tensor([[2, model.media_token_id, 11, 12, 13]])
    pixels = torch.randn(1, 1, 1, 3, 96, 96)
    draw = lambda: model(ids, pixel_values=pixels).logits  # noqa: E731
    assert torch.equal(draw(), draw())
    model.train()
    assert not torch.equal(draw(), draw())


def test_the_same_fast_pieces_are_laid_on_whatever_dropout_draws(trained):
    """Once they were not where two trials of the same text differed, and a resumed run had other roundings."""
    model = load_model(trained).model
    assert enable(model.train()) == ["chunked", "few_at_once"] and model.training


def test_what_does_not_go_together():
    both = parse_training_options(["--preset", "classroom-kosmos", "--set", "language.lora_rank=4"])
    with pytest.raises(InputError, match=r"all of the language model trains .* choose one"):
        build_flamingo(model_config(both))
    model = FlamingoModel(FlamingoConfig.of_model_config(model_config(parse_training_options(LORA))))
    with pytest.raises(InputError, match="built with a LoRA of its own"):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
