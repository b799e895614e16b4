"""The committed classroom backbones: small, safe to load, and good enough for everything that stands on them."""

import torch
from PIL import Image

from flamingo.classroom import scenes
from flamingo.classroom.documents import document
from flamingo.classroom.pretraining import patch_names, to_pixels
from flamingo.classroom.probes import probe_left_half, probe_patches
from flamingo.files import asset
from flamingo.interop.backbones import load_language_model, load_vision_encoder

FOLDER = asset("classroom")


class AsClip:
    """What the probes need of a CLIP."""

    def __init__(self):
        self.visual = load_vision_encoder(f"local-dir:{FOLDER / 'clip'}").tower


def test_they_are_small_and_hold_no_pickle():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}


def test_the_encoder_prepares_a_scene_as_it_was_trained():
    scene = scenes.make_scene(0, "test", 0).draw()
    encoder = load_vision_encoder(f"local-dir:{FOLDER / 'clip'}")
    torch.testing.assert_close(encoder.preprocess(scene), to_pixels([scene])[0], atol=1e-6, rtol=0)
    assert encoder.preprocess(Image.new("RGB", (200, 100))).shape == (3, 96, 96)


def test_patch_tokens_know_what_they_show_and_where():
    names = {name: i for i, name in enumerate([*scenes.OBJECTS, *scenes.GROUNDS])}
    assert probe_patches(AsClip(), to_pixels, patch_names, names, pictures=2000) > 0.95
    assert probe_left_half(AsClip(), to_pixels, names) > 0.95


def style_of(caption: str) -> str:
    first = caption.split()[0]
    if first.rstrip(":") in scenes.GROUNDS:
        return "list"
    if caption.endswith("stop"):
        return "telegram"
    return {"what?": "quiz", "once": "story"}.get(first, "sentence")


def test_the_language_model_follows_the_style_of_its_context():
    lm, tokenizer = load_language_model(str(FOLDER / "opt"))
    followed = 0
    for style in scenes.STYLES:
        for seed in range(4):
            drawn = [scenes.make_scene(seed, "test", i) for i in range(4)]
            context = "".join(f" {scene.caption(style)}\n" for scene in drawn)
            ids = tokenizer(context, return_tensors="pt").input_ids
            longer = lm.generate(ids, max_new_tokens=26, do_sample=False)[0, ids.shape[1] :]
            followed += style_of(tokenizer.decode(longer).strip().split("\n")[0]) == style
    assert followed >= 0.9 * 4 * len(scenes.STYLES)


def test_the_language_model_can_be_sure_of_a_name():
    """There is a hidden state for each object that names it with confidence: its word vectors are far enough apart."""
    lm, tokenizer = load_language_model(str(FOLDER / "opt"))
    ids = torch.tensor([tokenizer(f" {name}", add_special_tokens=False).input_ids[0] for name in scenes.OBJECTS])
    assert len(set(ids.tolist())) == len(ids)
    hidden = torch.zeros(len(ids), lm.config.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([hidden], lr=0.05)
    for _ in range(60):
        logits = lm.lm_head(lm.model.decoder.final_layer_norm(hidden))
        loss = torch.nn.functional.cross_entropy(logits, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_the_encoder_is_frozen_whatever_the_model_around_it_does():
    encoder = load_vision_encoder(f"local-dir:{FOLDER / 'clip'}")
    encoder.train()
    assert not encoder.training and not encoder.tower.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder(torch.zeros(1, 3, 96, 96)).shape == (1, 36, 192)


def test_documents_are_reproducible():
    assert document(1, "train", 2, include_novel=True) == document(1, "train", 2, include_novel=True)
