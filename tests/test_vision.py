"""Features are patch tokens, from every kind of tower; a wrong or missing weight file is an error, never a guess."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from flamingo.errors import InputError
from flamingo.fast import few_at_once
from flamingo.fast.onednn import PackedLinear, pack_matrices
from flamingo.files import fingerprint
from flamingo.interop.backbones import load_vision_encoder
from flamingo.model.language_model import extend_instance
from flamingo.model.vision import HuggingFaceClipEncoder

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 24, "layers": 2, "head_width": 12},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


def save_open_clip(folder, config):
    torch.manual_seed(0)
    clip = open_clip.CLIP(**config)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return clip


def test_a_built_in_tower_gives_its_normed_patch_tokens(tmp_path):
    clip = save_open_clip(tmp_path / "clip", TINY)
    encoder = load_vision_encoder(f"local-dir:{tmp_path / 'clip'}")
    assert (encoder.dim, encoder.image_size) == (24, (32, 32))
    pixels = torch.randn(3, 3, 32, 32)
    features = encoder(pixels)
    assert features.shape == (3, 4, 24)
    clip.visual.output_tokens = True
    torch.testing.assert_close(features, clip.visual.eval()(pixels)[1])
    before_norm = load_vision_encoder(f"local-dir:{tmp_path / 'clip'}", norm=False)(pixels)
    torch.testing.assert_close(clip.visual.ln_post(before_norm), features)


def test_a_timm_tower_gives_tokens_for_every_picture(tmp_path):
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "avg",
              "image_size": 224}  # fmt: skip
    save_open_clip(tmp_path / "clip", TINY | {"vision_cfg": vision})
    encoder = load_vision_encoder(f"local-dir:{tmp_path / 'clip'}")
    assert encoder.dim == 192
    assert encoder(torch.randn(2, 3, 224, 224)).shape == (2, 196, 192)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
def test_a_hugging_face_clip(tmp_path, norm, class_token):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    tower = CLIPVisionModel(config).eval()
    tower.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path)
    encoder = load_vision_encoder(str(tmp_path), norm=norm, class_token=class_token)
    pixels = torch.randn(2, 3, 32, 32)
    tokens = tower(pixels).last_hidden_state[:, 0 if class_token else 1 :]
    post_layernorm = getattr(tower, "vision_model", tower).post_layernorm
    torch.testing.assert_close(encoder(pixels), post_layernorm(tokens) if norm else tokens)
    from PIL import Image

    assert encoder.preprocess(Image.new("L", (50, 40))).shape == (3, 32, 32)


def test_many_pictures_are_encoded_a_few_at_a_time(tmp_path, monkeypatch):
    save_open_clip(tmp_path / "clip", TINY)
    encoder, pixels, counts = load_vision_encoder(f"local-dir:{tmp_path / 'clip'}"), torch.randn(5, 3, 32, 32), []
    together = encoder(pixels)
    monkeypatch.setattr(few_at_once, "PIXELS_AT_ONCE", 2 * 32 * 32)
    encoder.tower.conv1.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    extend_instance(encoder, few_at_once.FewAtOnceMixin)
    torch.testing.assert_close(encoder(pixels), together)
    assert counts == [2, 2, 1]
    monkeypatch.setattr(few_at_once, "PIXELS_AT_ONCE", 1)  # a picture larger than that goes alone
    assert encoder(pixels[:2]).shape == together[:2].shape and counts[3:] == [1, 1]


@pytest.mark.parametrize("kind", ["open_clip", "timm", "hugging face"])
def test_matrices_of_every_kind_of_tower_can_be_packed(tmp_path, kind):
    timm = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "image_size": 224}
    if kind == "hugging face":
        config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                  image_size=32, patch_size=16)  # fmt: skip
        encoder = HuggingFaceClipEncoder(CLIPVisionModel(config), kind, lambda picture: picture)
    else:
        save_open_clip(tmp_path / "clip", TINY | ({"vision_cfg": timm} if kind == "timm" else {}))
        encoder = load_vision_encoder(f"local-dir:{tmp_path / 'clip'}")
    encoder.to(torch.bfloat16)
    pixels = torch.randn(2, 3, *encoder.image_size).to(torch.bfloat16)
    before = encoder(pixels)
    pack_matrices(encoder)
    assert any(isinstance(module, PackedLinear) for module in encoder.modules())
    torch.testing.assert_close(encoder(pixels), before, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("timm", [False, True])
def test_the_class_token_stands_before_the_patches_when_asked_for(tmp_path, timm, norm):
    timm_vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "token",
                   "image_size": 224}  # fmt: skip
    clip = save_open_clip(tmp_path / "clip", TINY | {"vision_cfg": timm_vision} if timm else TINY)
    name = f"local-dir:{tmp_path / 'clip'}"
    without = load_vision_encoder(name, norm=norm)
    encoder = load_vision_encoder(name, norm=norm, class_token=True)
    assert encoder.dim == without.dim
    pixels = torch.randn(2, 3, *encoder.image_size)
    features = encoder(pixels)
    torch.testing.assert_close(features[:, 1:], without(pixels))
    if timm:  # timm gives class token and patches together, after its final norm
        if norm:
            torch.testing.assert_close(features, clip.visual.eval().trunk.forward_features(pixels))
    else:  # what CLIP compares with text is the projected class token
        pooled = features[:, 0] if norm else clip.visual.ln_post(features[:, 0])
        torch.testing.assert_close(pooled @ clip.visual.proj, clip.visual.eval()(pixels))


def test_a_tower_without_a_class_token_says_so(tmp_path):
    vision = {"timm_model_name": "resnet10t", "timm_model_pretrained": False, "timm_pool": "avg", "image_size": 32}
    save_open_clip(tmp_path / "clip", TINY | {"vision_cfg": vision})
    with pytest.raises(InputError, match="has no class token: set vision_class_token to false"):
        load_vision_encoder(f"local-dir:{tmp_path / 'clip'}", class_token=True)


def test_quickgelu_mismatch_is_an_error_before_anything_is_downloaded():
    with pytest.raises(InputError, match="ask for ViT-B-32-quickgelu:openai"):
        load_vision_encoder("ViT-B-32:openai")


@pytest.mark.parametrize("name, reason", [
    ("ViT-L-14:nonsense", "has no weights 'nonsense'"),
    ("ViT-Q-99:openai", "no model named 'ViT-Q-99'"),
    ("local-dir:does/not/exist", "no open_clip_config.json"),
    ("clip", "cannot tell what vision encoder"),
    ("nobody/no-clip", "cannot load the vision encoder nobody/no-clip"),
])  # fmt: skip
def test_unknown_encoders_are_named(name, reason):
    with pytest.raises(InputError, match=reason):
        load_vision_encoder(name)


def test_missing_weights_never_become_a_random_encoder(tmp_path):
    save_open_clip(tmp_path / "clip", TINY)
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load the vision encoder"):
        load_vision_encoder(f"local-dir:{tmp_path / 'clip'}")


def test_fingerprints_tell_weights_apart(tmp_path):
    a = torch.nn.Linear(30, 30)
    mark = fingerprint(a)
    assert mark == fingerprint(a)
    with torch.no_grad():
        a.weight.add_(1e-3)
    assert fingerprint(a) != mark


def test_a_fingerprint_of_more_values_than_float32_can_count():
    """The word vectors of OPT-125m are 38,608,896 numbers."""
    module = torch.nn.Module()
    module.register_buffer("words", torch.zeros(1).expand(38_608_896))
    assert len(fingerprint(module)) == 16
