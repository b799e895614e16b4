"""One configuration: each number in one place, by one dotted name, and by one flat name in config.json."""

import dataclasses
import json

import pytest

from flamingo.config import ModelConfig
from flamingo.errors import InputError
from flamingo.files import asset
from flamingo.interop.huggingface_config import FlamingoConfig
from flamingo.model.resampler import PerceiverResampler
from flamingo.presets import PRESETS, model_config
from flamingo.settings import FLAT, from_flat, parse_setting, paths, to_flat, with_settings
from flamingo.training.checkpoint import read_config
from flamingo.training.command_line import parse_training_options


def test_every_field_has_one_flat_name_and_every_flat_name_a_field():
    assert sorted(FLAT.values()) == sorted(paths(ModelConfig())) and len(set(FLAT.values())) == len(FLAT)


def test_flat_there_and_back():
    config = with_settings(ModelConfig(), {"fusion.heads": 3, "vision.class_token": True, "tokenizer.act": "sqrelu"})
    assert from_flat(to_flat(config)) == config
    assert FlamingoConfig.of_model_config(config).model_config() == config
    assert to_flat(config)["xattn_heads"] == 3 and to_flat(config)["vision_class_token"] is True


def test_names_of_flamingo_mini_are_understood():
    config = from_flat({"lm": "gpt2", "xattn_every": 2, "resampler_num_time_embeds": 4, "dim": 768})
    assert (config.language.name, config.fusion.every, config.tokenizer.max_num_frames) == ("gpt2", 2, 4)


def test_a_config_written_before_the_parts_had_names_still_loads():
    settings = json.loads(asset("classroom/flamingo/config.json").read_text())
    config = read_config(asset("classroom/flamingo"))
    assert config.fusion.heads == settings["xattn_heads"] and config.language.name == settings["lm"]


def test_a_setting_of_the_command_line_reaches_the_part():
    options = parse_training_options(["--set", "fusion.heads=3", "--set", "tokenizer.num_latents=5", "--lm", "x"])
    config = model_config(options)
    assert (config.fusion.heads, config.tokenizer.num_latents, config.language.name) == (3, 5, "x")
    assert config.tokenizer.depth == PRESETS["classroom"]["model"]["tokenizer.depth"]  # the rest is the preset's
    tokenizer = PerceiverResampler(dim=12, **dataclasses.asdict(config.tokenizer))
    assert tokenizer.latents.shape == (5, 12)


@pytest.mark.parametrize("text, value", [
    ("fusion.heads=3", 3), ("tokenizer.init_gain=2", 2.0), ("vision.class_token=true", True),
    ("language.decoder_layers=none", None), ("language.name=a=b", "a=b"), ("tokenizer_type=perceiver", "perceiver"),
])  # fmt: skip
def test_a_value_becomes_the_kind_of_its_field(text, value):
    assert parse_setting(text)[1] == value and type(parse_setting(text)[1]) is type(value)


@pytest.mark.parametrize("text, message", [
    ("fusion.haeds=3", r"--set fusion\.haeds=3: write PART\.FIELD=VALUE, where .*fusion\.heads"),
    ("fusion.heads", "write PART.FIELD=VALUE"), ("fusion.heads=many", "of type int"),
    ("vision.class_token=yes", "is true or false"),
])  # fmt: skip
def test_a_mistake_in_a_setting_is_one_sentence(text, message):
    with pytest.raises(InputError, match=message):
        parse_training_options(["--set", text])


def test_unknown_names_and_parts_are_refused():
    with pytest.raises(InputError, match="has no setting 'xattn_evry'"):
        from_flat({"xattn_evry": 2})
    with pytest.raises(InputError, match=r"has no setting 'fusion\.evry': it has fusion\."):
        with_settings(ModelConfig(), {"fusion.evry": 2})
    with pytest.raises(TypeError, match="hedas"):  # a swallowed keyword would be a default in disguise
        PerceiverResampler(dim=12, hedas=3)


def test_building_does_not_change_the_config_it_was_given():
    from conftest import IMAGE, PAD, TinyEncoder, tiny_lm

    from flamingo.model.build import build_from_parts
    from flamingo.model.vlm import SpecialTokens

    config = ModelConfig()
    before = to_flat(config)
    small = with_settings(config, {"tokenizer.depth": 1, "tokenizer.heads": 2, "fusion.heads": 2})
    build_from_parts(small, TinyEncoder(), tiny_lm(), SpecialTokens(IMAGE, 50, PAD), dim_visual=12)
    assert to_flat(config) == before and small.tokenizer.depth == 1
    for name, value in (("tokenizer_type", "q-former"), ("fusion_type", "stream")):
        with pytest.raises(InputError, match=f"unknown {name} .*choose one of"):
            build_from_parts(
                with_settings(small, {name: value}), TinyEncoder(), tiny_lm(), SpecialTokens(IMAGE, 50, PAD), 12
            )
