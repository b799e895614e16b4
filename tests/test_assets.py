"""The committed classroom backbones: small, safe to load, and good enough for everything that stands on them."""

import random

import torch
from PIL import Image

from flamingo.classroom import scenes
from flamingo.classroom.documents import document, naming_lines
from flamingo.classroom.invented import is_held_out
from flamingo.classroom.pretrain_clip import patch_names, to_pixels
from flamingo.classroom.pretrain_lm import place_lookup_heads, spread_words
from flamingo.classroom.probes import probe_left_half, probe_patches, recall
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
    assert {path.suffix for path in files} == {".json", ".jsonl", ".md", ".safetensors"}


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


def test_the_language_model_looks_up_names_it_has_never_read():
    lm, tokenizer = load_language_model(str(FOLDER / "opt"))
    documents = [naming_lines(random.Random(f"looked up {i}"), held_out=True) for i in range(100)]
    assert all(is_held_out(line.split()[-1]) for lines in documents for line in lines)
    assert recall(lm, tokenizer, documents) >= 0.95


def test_the_placed_heads_find_the_token_that_stood_behind_this_one():
    lm, tokenizer = load_language_model(str(FOLDER / "opt"))
    fresh = type(lm)(lm.config).eval()
    torch.manual_seed(0)
    spread_words(fresh.get_input_embeddings().weight, tokenizer)
    place_lookup_heads(fresh)
    fresh.set_attn_implementation("eager")
    once = torch.randperm(1000)[:50] + 4
    first, second = fresh(torch.cat([once, once])[None], output_attentions=True).attentions[:2]
    here, before = torch.arange(1, 100), torch.arange(99)
    assert first[0, 0, here, before].mean() > 0.5  # one token back
    again, behind = torch.arange(50, 99), torch.arange(1, 50)
    assert second[0, 0, again, behind].mean() > 10 / 75  # ten times as much as if it looked anywhere
