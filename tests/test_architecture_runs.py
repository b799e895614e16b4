"""Kosmos, BLIP and LLaVA as a user meets them: trained, killed, resumed, evaluated, and behind the Hugging Face API."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_commands import run
from test_resume import start, start_and_kill

from flamingo import FlamingoConfig, FlamingoModel, FlamingoProcessor, InputError
from flamingo.classroom import scenes
from flamingo.data.batches import Collate
from flamingo.data.chunks import Chunk
from flamingo.interop import compat
from flamingo.presets import model_config
from flamingo.training.command_line import parse_training_options

SHORT = ["--steps", "6", "--batch-size", "4", "--eval-batches", "1", "--eval-every", "6", "--save-every", "2",
         "--dtype", "float32", "--device", "cpu"]  # fmt: skip
PICTURES = [scenes.make_scene(0, "test", i).draw() for i in range(3)]


@pytest.fixture(scope="module", params=["kosmos", "blip", "llava"])
def saved(request, tmp_path_factory):
    """(name, folder, model) of a fresh classroom model."""
    torch.manual_seed(0)
    config = model_config(parse_training_options(["--preset", f"classroom-{request.param}"]))
    model = FlamingoModel(FlamingoConfig.of_model_config(config)).eval()
    with torch.no_grad():  # as after training: a checkpoint must hold it
        for parameter in model.parameters_trainable():
            parameter.add_(0.01 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, folder, model


def test_the_checkpoint_holds_what_trains(saved):
    name, folder, model = saved
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == model.state_dict_trainable().keys()
    assert any("decoder.layers.0" in key for key in tensors) == (name == "kosmos")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["fusion_type"] == "language-stream" and "xattn_heads" not in settings


def test_a_loaded_model_says_the_same(saved):
    _, folder, model = saved
    again, processor = FlamingoModel.from_pretrained(folder), FlamingoProcessor.from_pretrained(folder)
    inputs = processor(images=PICTURES[:2], text=["<image> a cat<|endofchunk|><image> a"])
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    options = {"max_new_tokens": 6, "num_beams": 3}
    assert torch.equal(again.generate(**inputs, **options), model.generate(**inputs, **options))
    captions = again.generate_captions(
        processor, images=PICTURES, max_new_tokens=4, num_return_sequences=2, num_beams=2
    )
    assert len(captions) == 6


def test_stepping_by_hand_equals_the_whole_text(saved):
    """Two texts with one and two pictures, read in three parts, the second picture in a later one."""
    _, folder, model = saved
    processor = FlamingoProcessor.from_pretrained(folder)
    texts = ["<image> a cat on a red ground", "<image> a dog and a tree here"]
    inputs = processor(images=PICTURES[:2], text=texts)
    whole = model(**inputs).logits
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], pixel_values=inputs["pixel_values"], use_cache=True)
    parts, cache = [first.logits], compat.cache_of(first)
    for k in range(4, ids.shape[1]):
        step = model(input_ids=ids[:, k : k + 1], attention_mask=mask[:, : k + 1], cache=cache, use_cache=True)
        parts, cache = [*parts, step.logits], compat.cache_of(step)
    read = torch.cat(parts, dim=1)
    torch.testing.assert_close(read[mask.bool()], whole[mask.bool()], rtol=1e-3, atol=1e-3)


def test_no_layer_looks_and_no_assistant_reads_along(saved):
    _, folder, model = saved
    assert model.get_modified_layers() == []
    inputs = FlamingoProcessor.from_pretrained(folder)(images=PICTURES[:1], text="<image> a")
    with pytest.raises(InputError, match="assistant_model"):
        model.generate(**inputs, assistant_model=model)


def test_killed_and_resumed_it_ends_the_same_and_evaluates(tmp_path):
    preset = ("--preset", "classroom-kosmos")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, *SHORT, *preset).wait() == 0
    start_and_kill(killed, 3, *SHORT, *preset)
    result = run("train.py", "--resume", killed)
    assert result.returncode == 0, result.stderr
    a, b = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])["attn"] == []
    result = run(
        "evaluate.py", whole, "--n", "6", "--shots", "0", "1", "--trials", "1", "--queries", "6", "--device", "cpu"
    )
    assert result.returncode == 0, result.stderr
    scores = json.loads((whole / "evaluation.json").read_text())
    assert "closed_gates" not in scores and scores["attention"]["examples"] == [] and "1" in scores["shots"]
    assert (whole / "report.html").stat().st_size > 1000


def test_more_shots_than_positions_are_refused_with_the_picture_counted():
    from flamingo.data.chunks import Chunk
    from flamingo.evaluation.predictor import Predictor
    from flamingo.interop.backbones import build_flamingo

    model, processor, _ = build_flamingo(
        model_config(parse_training_options(["--preset", "classroom-llava", "--set", "linear.shuffle=1"]))
    )
    assert model.tokens_per_image == 36
    examples = [Chunk(0, "", "a cat")] * 40
    with pytest.raises(InputError, match="--shots 40 does not fit: the language model has 512 positions, enough for 1"):
        Predictor(model, processor).check_room(40, examples, examples[:1])


def test_texts_are_cut_where_they_do_not_fit_with_their_pictures(saved):
    """Nine pictures in a text; of the longest that still fits no token more could be kept."""
    _, folder, model = saved
    vlm, processor = model.flamingo, FlamingoProcessor.from_pretrained(folder)
    assert vlm.room_of_texts() == (512, vlm.tokens_per_image)
    text = [[Chunk(0, "", "a cat on a red ground") for _ in range(9)]]
    tokens, cut = Collate(processor, 192, room=vlm.room_of_texts()).tokens(text)
    assert not cut
    is_image = tokens["input_ids"][0] == processor.media_token_id
    for of_a_picture in (60, 100, 511):
        tokens, cut = Collate(processor, 192, room=(512, of_a_picture)).tokens(text)
        kept = tokens["input_ids"].shape[1]
        taken = [k + of_a_picture * int(is_image[:k].sum()) for k in (kept, kept + 1)]
        assert cut == 1 and taken[0] <= 512 < taken[1]


def test_a_picture_that_no_text_has_room_for_is_said_before_the_first_step(tmp_path):
    options = ["--preset", "classroom-kosmos", "--set", "tokenizer.num_latents=600", *SHORT]
    done = run("train.py", *options, "--out", tmp_path / "run")
    assert done.returncode == 2 and "no training text has a token to predict" in done.stderr
    assert "512 positions of the language model, of which a picture takes 600" in done.stderr
    assert "Traceback" not in done.stderr
