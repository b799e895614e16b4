"""The committed classroom backbones: small, safe to load, and good enough for everything that stands on them."""

import torch
from PIL import Image

from flamingo.build import load_language_model
from flamingo.data import scenes
from flamingo.data.backbones import document, patch_names, to_pixels
from flamingo.data.probes import perplexity, probe_left_half, probe_patches
from flamingo.options import asset
from flamingo.vision import load_vision_encoder

FOLDER = asset("classroom")


class AsClip:
    """What the probes need of a CLIP."""

    def __init__(self):
        self.visual = load_vision_encoder(f"local-dir:{FOLDER / 'clip'}").tower


def test_they_are_small_and_hold_no_pickle():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_the_encoder_prepares_a_scene_as_it_was_trained():
    scene = scenes.make_scene(0, "test", 0).draw()
    encoder = load_vision_encoder(f"local-dir:{FOLDER / 'clip'}")
    torch.testing.assert_close(encoder.preprocess(scene), to_pixels([scene])[0], atol=1e-6, rtol=0)
    assert encoder.preprocess(Image.new("RGB", (200, 100))).shape == (3, 96, 96)


def test_patch_tokens_know_what_they_show_and_where():
    names = {name: i for i, name in enumerate([*scenes.OBJECTS, *scenes.GROUNDS])}
    assert probe_patches(AsClip(), to_pixels, patch_names, names, pictures=900) > 0.95
    assert probe_left_half(AsClip(), to_pixels, names, pictures=1500) > 0.95


def test_the_language_model_follows_the_style_of_its_context():
    lm, tokenizer = load_language_model(str(FOLDER / "opt"))
    right = 0
    for style in scenes.STYLES:
        told = [scenes.make_scene(5, "test", i) for i in range(6)]
        context = "\n".join(f" {scene.caption(style)}" for scene in told[:-1]) + "\n"
        losses = {s: perplexity(lm, tokenizer, [f"{context} {told[-1].caption(s)}"]) for s in scenes.STYLES}
        right += min(losses, key=losses.get) == style
    assert right == len(scenes.STYLES)


def test_the_language_model_can_be_sure_of_a_name():
    """Told a scene, it answers a question about it: so its word vectors are far enough apart to name things."""
    lm, tokenizer = load_language_model(str(FOLDER / "opt"))
    probabilities = []
    for i in range(40):
        scene = scenes.make_scene(5, "test", i)
        if scene.layout != "one":
            continue
        story = f" As a list: {scene.caption('list')}\n As a telegram:"
        ids = tokenizer(story, return_tensors="pt").input_ids
        answer = tokenizer(f" {scene.names[0]}", add_special_tokens=False).input_ids[0]
        probabilities.append(lm(ids).logits[0, -1].softmax(-1)[answer].item())
    assert sum(probabilities) / len(probabilities) > 0.5


def test_documents_are_reproducible():
    assert document(1, "train", 2, include_novel=True) == document(1, "train", 2, include_novel=True)
