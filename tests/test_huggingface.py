"""FlamingoModel and FlamingoProcessor behave as users of transformers expect."""

import inspect
import json
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextStreamer, pipeline

from flamingo import FlamingoConfig, FlamingoModel, FlamingoProcessor, InputError
from flamingo.classroom import scenes
from flamingo.config import TrainingOptions
from flamingo.files import asset
from flamingo.interop import compat
from flamingo.presets import model_config

PICTURES = [scenes.make_scene(0, "test", i).draw() for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved classroom model whose gates are open, so that pictures matter."""
    torch.manual_seed(0)
    model = FlamingoModel(FlamingoConfig.of_model_config(model_config(TrainingOptions())))
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            parameter.data.fill_(0.8)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> FlamingoModel:
    return FlamingoModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder) -> FlamingoProcessor:
    return FlamingoProcessor.from_pretrained(folder)


# ------------------------------------------------------------------------------------------- load and save
def test_the_checkpoint_holds_what_trains_and_names_what_is_frozen(folder, model):
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == model.state_dict_trainable().keys()
    assert not [name for name in tensors if "decoder_layer." in name or name.startswith("vision_encoder")]
    config = json.loads((folder / "config.json").read_text())
    assert config["lm"] == "asset:classroom/opt" and len(config["lm_fingerprint"]) == 16
    assert sum(p.numel() for p in model.parameters_trainable()) == sum(t.numel() for t in tensors.values())


def test_auto_classes_and_the_pipeline_find_it(folder, model):
    assert isinstance(AutoConfig.from_pretrained(folder), FlamingoConfig)
    assert isinstance(AutoProcessor.from_pretrained(folder), FlamingoProcessor)
    again = AutoModelForImageTextToText.from_pretrained(folder)
    for name, tensor in model.state_dict_trainable().items():
        assert torch.equal(tensor, again.state_dict_trainable()[name])
    pipe = pipeline("image-text-to-text", model=str(folder))
    answer = pipe(images=PICTURES[0], text="<image> a", max_new_tokens=5)
    assert answer[0]["generated_text"].startswith("<image> a") and len(answer[0]["generated_text"]) > len("<image> a")


def test_loading_says_what_it_found(folder, capsys):
    FlamingoModel.from_pretrained(folder)
    count = len(load_file(folder / "model.safetensors"))
    assert f"{count} trained tensors loaded, beside asset:classroom/opt" in capsys.readouterr().err


def test_a_config_alone_works_and_unknown_fields_are_named(folder, tmp_path):
    assert FlamingoConfig().lm == "facebook/opt-125m"
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"xattn_evry": 2}))
    with pytest.raises(InputError, match="has no setting 'xattn_evry'"):
        FlamingoModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is damaged"):
        FlamingoModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="neither a folder nor a model on the hub"):
        FlamingoModel.from_pretrained("nobody/nothing")


# -------------------------------------------------------------------------------------------------- pictures
def test_every_form_of_pictures_is_the_same(model, processor):
    pixels = processor.preprocess_images(PICTURES[:2])  # (2, 1, C, H, W)
    six = model.encode_resample_visuals(pixels[:, None])
    assert six.shape == (2, 1, 16, 192)
    torch.testing.assert_close(model.encode_resample_visuals(pixels), six)  # (B, T_img, C, H, W)
    one_text = model.encode_resample_visuals(pixels[:, 0])  # (T_img, C, H, W)
    torch.testing.assert_close(one_text[0], six[:, 0])
    inputs = processor(images=PICTURES[:2], text=["<image> a", "<image> two of"])
    expected = model(**inputs).logits
    pixel_values = inputs.pop("pixel_values")
    for given in ({"pixel_values": pixel_values[:, 0, 0]}, {"pixel_values": pixel_values[:, :, 0]},
                  {"visual_features": six}):  # fmt: skip
        torch.testing.assert_close(model(**inputs, **given).logits, expected)
    with pytest.raises(ValueError, match="do not fit 2 texts"):
        model(**inputs, pixel_values=pixel_values[:1])


def test_one_caption_for_each_picture(model, processor):
    together = model.generate_captions(processor, images=PICTURES, max_new_tokens=6)
    assert len(together) == 3
    for picture, caption in zip(PICTURES, together, strict=True):
        assert model.generate_captions(processor, images=picture, max_new_tokens=6) == [caption]
    pixels = processor.preprocess_images(PICTURES)
    assert model.generate_captions(processor, pixel_values=pixels[:, 0], max_new_tokens=6) == together
    with pytest.raises(ValueError, match="exactly one <image>"):
        model.generate_captions(processor, images=PICTURES, prompt="a")


# ----------------------------------------------------------------------------------------- forward, generate
def test_forward_shows_its_arguments_and_has_a_loss(model, processor):
    assert {"pixel_values", "media_locations", "labels", "cache", "past_key_values"} <= set(
        inspect.signature(model.forward).parameters
    )
    inputs = processor(images=PICTURES[:1], text=processor.prepare_caption("a dog"), padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["media_locations"], -100)
    output = model(**inputs, labels=labels)
    own = model.flamingo(inputs["input_ids"], inputs["attention_mask"], labels, pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(output.loss, own.loss)
    assert output.logits.shape[:2] == labels.shape


@torch.no_grad()
def test_reading_on_from_a_cache_equals_reading_at_once(model, processor):
    inputs = processor(images=PICTURES[:2], text=["<image> a dog<|endofchunk|><image> a cat"])
    whole = model(**inputs).logits
    first = {**inputs, **{k: inputs[k][:, :4] for k in ("input_ids", "attention_mask", "media_locations")}}
    first["pixel_values"] = first["pixel_values"][:, :1]
    read = model(**first, use_cache=True)
    rest = {**inputs, "input_ids": inputs["input_ids"][:, 4:]}
    on = model(**rest, cache=compat.cache_of(read)).logits
    torch.testing.assert_close(torch.cat([read.logits, on], dim=1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_cache_has_two_names(model, processor):
    inputs = processor(images=PICTURES[:1], text="<image> a dog")
    first = {**inputs, **{k: inputs[k][:, :3] for k in ("input_ids", "attention_mask", "media_locations")}}
    rest = {**inputs, "input_ids": inputs["input_ids"][:, 3:]}
    logits = [model(**rest, **{name: compat.cache_of(model(**first, use_cache=True))}).logits
              for name in ("cache", "past_key_values")]  # fmt: skip
    assert torch.equal(*logits)


@torch.no_grad()
def test_candidates_are_scored_with_a_picture_and_without(model, processor):
    """Without one as the language model alone does: <image> is there, and nothing to see."""
    inputs = processor(images=PICTURES[:1], text="<image> a")
    candidates = [processor.tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" dog", " red cat")]
    seen = model.score_sequences(candidates=candidates, **inputs)
    pixels = inputs.pop("pixel_values")
    blind = model.score_sequences(candidates=candidates, **inputs)
    assert not torch.allclose(seen, blind)
    for scores, pictures in ((seen, {"pixel_values": pixels}), (blind, {})):
        for k, candidate in enumerate(candidates):
            ids = torch.cat([inputs["input_ids"], torch.tensor([candidate])], dim=1)
            said = model(ids, **pictures).logits.log_softmax(-1)[0, -len(candidate) - 1 : -1]
            expected = said.gather(1, torch.tensor(candidate)[:, None]).sum()
            torch.testing.assert_close(scores[0, k], expected, atol=1e-4, rtol=1e-4)


STRATEGIES = {
    "beams": {"num_beams": 3},
    "beams, several": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "top-k": {"do_sample": True, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3},
    "min-p": {"do_sample": True, "min_p": 0.1},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_generates_and_never_an_image_or_padding(model, processor, strategy):
    torch.manual_seed(0)
    inputs = processor(images=PICTURES[:2], text=["<image> a", "<image>"])
    options = STRATEGIES[strategy]
    made = model.generate(**inputs, max_new_tokens=8, eos_token_id=-1, **options)
    assert made.shape == (2 * options.get("num_return_sequences", 1), inputs["input_ids"].shape[1] + 8)
    new = made[:, inputs["input_ids"].shape[1] :]
    assert not (new == processor.media_token_id).any() and not (new == processor.pad_token_id).any()


def test_the_scores_of_the_tokens_of_a_beam_add_up_to_the_score_of_the_beam(model, processor):
    inputs = processor(images=PICTURES[:2], text=["<image> a", "<image>"])
    made = model.generate(
        **inputs, max_new_tokens=8, num_beams=3, length_penalty=0.0, output_scores=True, return_dict_in_generate=True
    )
    each = model.compute_transition_scores(made.sequences, made.scores, made.beam_indices)
    torch.testing.assert_close(each.sum(dim=1), made.sequences_scores)


def test_streamers_and_stopping_criteria_are_passed_on(model, processor, capsys):
    inputs = processor(images=PICTURES[0], text="<image> a")
    made = model.generate(**inputs, max_new_tokens=6, streamer=TextStreamer(processor.tokenizer))
    assert processor.decode(made[0])[:8] in capsys.readouterr().out
    stop = model.generate(**inputs, max_new_tokens=6, stopping_criteria=[lambda ids, scores: True])
    assert stop.shape[1] == inputs["input_ids"].shape[1] + 1


def test_two_threads_do_not_see_each_others_picture(model, processor):
    alone = [model.generate_captions(processor, images=picture, max_new_tokens=6)[0] for picture in PICTURES]
    found = {}
    for i, picture in enumerate(PICTURES):  # one after the other, each from a thread of its own
        thread = threading.Thread(
            target=lambda i=i, picture=picture: found.update(
                {i: model.generate_captions(processor, images=picture, max_new_tokens=6)[0]}
            )
        )
        thread.start()
        thread.join()
    assert [found[i] for i in range(3)] == alone
    assert all(layer.vis_x is None for layer in model.get_modified_layers())


def test_training_the_language_model_is_a_choice_that_is_saved(folder, tmp_path):
    model = FlamingoModel.from_pretrained(folder)
    before = len(model.state_dict_trainable())
    model.unfreeze_lm()
    assert len(model.state_dict_trainable()) > before
    next(p for n, p in model.named_parameters() if n.endswith("fc1.weight")).data.add_(1.0)
    model.save_pretrained(tmp_path)
    again = FlamingoModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict_trainable().items():
        assert torch.equal(tensor, again.state_dict_trainable()[name])
    model.freeze_lm()
    assert len(model.state_dict_trainable()) == before


# ------------------------------------------------------------------------------------------------- processor
def test_pictures_are_dealt_out_to_the_tags(processor):
    inputs = processor(images=PICTURES, text=["<image> a <image> b", "<image> c"])
    assert inputs["pixel_values"].shape == (2, 2, 1, 3, 96, 96)
    assert not inputs["pixel_values"][1, 1].any()
    assert inputs["media_locations"].sum(1).tolist() == [2, 1]
    assert processor.remove_tags("<image> a dog<|endofchunk|>") == "a dog"


@pytest.mark.parametrize(
    "images, text, message",
    [(PICTURES[:1], ["<image> a", "<image> b"], "text 1 has 1 <image> tags but 0 pictures"),
     (PICTURES, ["<image> a", "<image> b"], "text 1 has 1 <image> tags but 2 pictures"),
     ([[PICTURES[0]], []], ["<image>", "<image>"], "text 1 has 1"), (None, [], "batch is empty"),
     (None, None, "give images, text or both")],
)  # fmt: skip
def test_pictures_and_tags_that_disagree_are_one_sentence(processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


def test_too_long_a_text_is_one_sentence(model, processor):
    inputs = processor(images=PICTURES[0], text="<image>" + " dog" * 600)
    with pytest.raises(ValueError, match="longer than the 512 positions"):
        model(**inputs)
    with pytest.raises(ValueError, match="need 611 positions"):
        model.generate(**processor(images=PICTURES[0], text="<image>"), max_new_tokens=609)


# ---------------------------------------------------------------------------------------------- command line
def test_files_are_captioned_from_the_shell(folder, tmp_path):
    PICTURES[0].save(tmp_path / "one.png")
    command = [sys.executable, "-m", "flamingo", str(folder)]
    done = subprocess.run([*command, str(tmp_path / "one.png")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path}/one.png\t")
    (tmp_path / "two.png").write_text("no picture")
    failed = subprocess.run([*command, str(tmp_path / "two.png")], capture_output=True, text=True)
    assert failed.returncode == 2 and "cannot be read as a picture" in failed.stderr
    assert failed.stderr.splitlines()[-1].endswith("1 of 1 pictures could not be captioned")


def test_a_device_map_is_one_device_or_refused():
    folder = asset("classroom/flamingo")
    assert FlamingoModel.from_pretrained(folder, device_map="cpu").device.type == "cpu"
    with pytest.raises(InputError, match="device_map='auto': name one device"):
        FlamingoModel.from_pretrained(folder, device_map="auto")
