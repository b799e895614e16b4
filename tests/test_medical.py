"""Chest X-rays: the Chex layout, the medical fork's names, and the whole path with backbones of the same kinds, tiny
and random: train, stop, resume, findings of a picture, evaluate."""

import inspect
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import tiny_lm
from PIL import Image
from safetensors.torch import load_file, save_file
from test_dicom import RAMP, dicom
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BioGptConfig, BioGptForCausalLM, PreTrainedTokenizerFast

import evaluate
import train
from flamingo import FlamingoConfig, FlamingoModel, InputError
from flamingo import __main__ as captioning
from flamingo.config import CrossAttentionConfig, TrainingOptions
from flamingo.data.captions import load_captions
from flamingo.data.chex import Chex, read_chex
from flamingo.files import asset
from flamingo.interop import compat
from flamingo.interop.backbones import load_vision_encoder
from flamingo.model.language_model import FlamingoLayer, FlamingoLMMixin, extend_instance
from flamingo.presets import model_config
from flamingo.training.log import RunLog


# ---------------------------------------------------------------------------------------------------- the Chex layout
def write_chex(folder: Path, count: int = 6) -> Path:
    """Studies of one or two pictures, PNG and DICOM; one study points nowhere, one has no text, one no file."""
    folder.mkdir(exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        names = [f"{i}.png", f"{i} side.png"][: 1 + i % 2]
        for name in names:
            Image.fromarray((RAMP * (i + 1)).astype(np.uint16)).save(folder / name)
        images.append({"id": i, "file": names if i % 2 else names[0], "annotation_id": 100 + i})
        annotations.append({"id": 100 + i, "findings": f"w{i} w1 w2"})
    images += [{"id": 90, "file": "0.png", "annotation_id": 999}, {"id": 91, "file": "0.png", "annotation_id": 200},
               {"id": 92, "annotation_id": 100}]  # fmt: skip
    annotations.append({"id": 200, "findings": " "})
    (folder / "chex.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "chex.json"


def test_chex_is_read_by_the_names_of_the_fork(tmp_path):
    file = write_chex(tmp_path)
    chex = read_chex(file)
    assert chex.dataset.keys() == {"images", "annotations"}
    assert chex.imgs["1"] == {"id": 1, "file": ["1.png", "1 side.png"], "annotation_id": 101}
    assert chex.anns["101"]["findings"] == "w1 w1 w2"
    rows = [row for _, row in chex.rows()]
    assert rows[2] == {"image": "1 side.png", "caption": "w1 w1 w2", "study": "101"} and len(rows) == 9
    assert len(chex.notes) == 3
    by_id = {part: {str(entry["id"]): entry for entry in entries} for part, entries in chex.dataset.items()}
    assert [row for _, row in Chex(by_id, "x").rows()] == rows
    assert read_chex(Path("x.jsonl")) is None
    (tmp_path / "rows.json").write_text('{"images": ["a.png"], "text": "x"}\n' * 2)
    assert read_chex(tmp_path / "rows.json") is None


def test_a_chex_set_is_trained_on_and_what_points_nowhere_is_counted(tmp_path):
    sets = load_captions(write_chex(tmp_path))
    assert sum(map(len, sets.values())) == 9
    studies = [{part.row(i)["study"] for i in range(len(part))} for part in sets.values()]
    assert not set.intersection(*studies)  # no study is trained on and held out
    skipped = "\n".join(line for part in sets.values() for line in part.skipped)
    for words in ("its annotation 999 is not there", "its annotation has no text", "image 92: it names no file"):
        assert words in skipped
    (tmp_path / "folder").mkdir()
    write_chex(tmp_path / "folder").rename(tmp_path / "folder" / "train.json")
    assert sum(map(len, load_captions(tmp_path / "folder").values())) == 9  # a folder of such files and their pictures


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_pictures_of_a_study_stay_together_also_with_a_row_each(seed, files, tmp_path):
    """Three pictures of each of eight studies, each with an id of its own; one study is numbered by a text. In two
    files: some pictures of each study in one of them, the others in the other."""
    images = [{"id": i, "file": f"{i}.png", "annotation_id": str(i % 8) if i == 20 else i % 8} for i in range(24)]
    annotations = [{"id": study, "report": f"report {study}"} for study in range(8)]
    for i in range(24):
        Image.fromarray(RAMP + np.uint16(i)).save(tmp_path / f"{i}.png")
    for k in range(files):
        dataset = {"images": images[k * 12 :] if k else images[: 24 // files], "annotations": annotations}
        (tmp_path / f"part{k}.json").write_text(json.dumps(dataset))
    sets = load_captions(tmp_path, seed=seed)
    read = {name: {repr(part.texts(i)) for i in range(len(part))} for name, part in sets.items()}
    assert not read["train"] & read["validation"]  # no report is trained on and held out
    assert len(read["train"] | read["validation"]) == 8 and sum(map(len, sets.values())) == 24
    assert len(sets["validation"]) == 3 * len(read["validation"]) == 6


@pytest.mark.parametrize("dataset, message", [
    ({"images": 3, "annotations": []}, "its images must be a list of objects with an id"),
    ({"images": [], "annotations": [{"x": 1}]}, "its annotations must be a list of objects with an id"),
    ({"images": [], "annotations": {"7": 3}}, "7 of its annotations is no object"),
    ({"images": [{"id": 1}, {"id": 1}], "annotations": []}, "two of its images have the same id"),
    ({"images": [{"id": 1, "file": "a.png", "annotation_id": 2}], "annotations": []}, "its annotation 2 is not there"),
    ({"images": [], "annotations": []}, "chex.json"),
])  # fmt: skip
def test_chex_files_that_are_none(dataset, message, tmp_path):
    (tmp_path / "chex.json").write_text(json.dumps(dataset))
    with pytest.raises(InputError, match=message):
        load_captions(tmp_path / "chex.json")


# ------------------------------------------------------------------------------------------- the names of the seed
PROCESSOR = ["__call__", "encode_text", "prepare_caption", "prepare_captions", "remove_tags", "_remove_tags",
             "get_media_locations", "preprocess_images"]  # fmt: skip
MODEL = ["forward", "get_modified_layers", "freeze_vm", "freeze_lm", "unfreeze_lm", "state_dict_trainable",
         "parameters_trainable", "encode_resample_visuals", "generate", "generate_captions", "from_pretrained",
         "prepare_captions", "prepare_inputs_for_generation"]  # fmt: skip
LANGUAGE_MODEL = ["_init_layers"]  # the fork has it on the model; here it belongs to what it changes
# Of the fork's arguments one is left out: head_mask of forward. No language model of transformers 5 takes one any more.
ARGUMENTS = {
    "forward": ["input_ids", "attention_mask", "media_locations", "pixel_values", "visual_features", "inputs_embeds",
                "use_cache", "past_key_values", "return_dict", "labels", "loss_reduction"],
    "prepare_inputs_for_generation": ["input_ids", "media_locations", "attention_mask", "pixel_values",
                                      "visual_features", "past", "past_key_values"],
    "generate_captions": ["processor", "pixel_values", "images", "prompt", "device"],
    "encode_resample_visuals": ["pixel_values"],
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> FlamingoModel:
    return FlamingoModel.from_pretrained(asset("classroom/flamingo"))


def test_every_method_of_the_medical_fork_is_there(model):
    processor = model.processor
    for thing, names in ((processor, PROCESSOR), (model, MODEL), (model.flamingo.lang_encoder, LANGUAGE_MODEL)):
        assert [name for name in names if not callable(getattr(thing, name, None))] == []
    for name, arguments in ARGUMENTS.items():
        assert set(arguments) <= set(inspect.signature(getattr(model, name)).parameters)
    for name in ("tokenizer", "vision_processor", "config"):
        assert getattr(processor if name != "config" else model, name) is not None
    assert model.flamingo.vision_encoder is not None and model.flamingo.resampler is model.flamingo.perceiver
    assert model.lm_head is model.get_output_embeddings()


def test_the_methods_do_what_the_fork_says(model):
    processor, picture = model.processor, Image.new("RGB", (96, 96), "blue")
    read = processor.encode_text(
        "<image> a cat", device="cpu", length=9, return_tensors="pt", return_attention_mask=True
    )
    assert read["input_ids"].shape == (1, 9) and read["media_locations"].sum() == 1
    assert "attention_mask" not in processor.encode_text("a cat", return_attention_mask=False)
    assert processor.encode_text("a cat and an apple", length=3)["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="return_tensors='tf'"):
        processor.encode_text("a", return_tensors="tf")
    both = processor(images=[picture], text="<image> a", device="cpu")
    assert {"input_ids", "media_locations", "attention_mask", "pixel_values"} == both.keys()
    assert processor._remove_tags("<image> a<|endofchunk|>") == processor.remove_tags("<image> a<|endofchunk|>") == "a"
    assert model.prepare_captions(["a cat"]) == ["<image> a cat<|endofchunk|>"]
    (caption,) = model.generate_captions(processor, images=picture, max_length=9, num_beams=2, device="cpu")
    assert isinstance(caption, str)


@pytest.mark.parametrize("name", ["past", "past_key_values", "cache", None])
@pytest.mark.parametrize("preset", ["classroom", "classroom-kosmos"])
def test_a_loop_over_prepared_inputs_says_what_generate_says(model, preset, name):
    """Two texts with unlike pictures, the second longer; with the cache by each of its names, and without one."""
    if preset != "classroom":
        torch.manual_seed(0)
        model = FlamingoModel(FlamingoConfig.of_model_config(model_config(TrainingOptions(preset=preset)))).eval()
    pictures = [Image.new("RGB", (96, 96), color) for color in ("blue", "red")]
    inputs = dict(model.processor(images=pictures, text=["<image> a", "<image> there is a"]))
    wanted = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    cache, length, most = None, inputs["input_ids"].shape[1], []
    for _ in range(5):
        step = model.prepare_inputs_for_generation(
            **inputs, use_cache=name is not None, **({} if cache is None else {name: cache})
        )
        most.append(step["input_ids"].shape[1])
        output = model(**step)
        cache = compat.cache_of(output) if name else None
        allowed = output.logits[:, -1].clone()
        allowed[:, [model.processor.media_token_id, model.processor.eoc_token_id]] = -torch.inf
        inputs["input_ids"] = torch.cat([inputs["input_ids"], allowed.argmax(dim=1)[:, None]], dim=1)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        inputs["media_locations"] = torch.nn.functional.pad(inputs["media_locations"], (0, 1))
    assert torch.equal(inputs["input_ids"], wanted)
    assert most == ([length, 1, 1, 1, 1] if name else list(range(length, length + 5)))


def test_layers_of_a_live_language_model_are_wrapped_in_their_list():
    lm = tiny_lm(layers=4)
    layers, before = lm.model.decoder.layers, list(lm.model.decoder.layers)
    ids = torch.arange(4, 10)[None]
    plain = lm(ids).logits
    extend_instance(lm, FlamingoLMMixin)
    lm._init_layers(layers, dim_visual=12, config=CrossAttentionConfig(every=2, heads=2, dim_head=8))
    wrapped = [layer for layer in layers if isinstance(layer, FlamingoLayer)]
    assert len(wrapped) == 2 and lm._get_decoder_layers() == wrapped
    assert [getattr(layer, "decoder_layer", layer) for layer in layers] == before
    assert torch.equal(lm(ids).logits, plain)


def test_a_head_mask_is_refused_by_name(model):
    inputs = model.processor(images=Image.new("RGB", (96, 96)), text="<image> a")
    assert model(**inputs, head_mask=None).logits.shape[0] == 1
    with pytest.raises(TypeError, match="forward of FlamingoModel has no argument 'head_mask'"):
        model(**inputs, head_mask=torch.ones(2, 4))


# ------------------------------------------------------------------------------------------------------ the whole path
def save_biogpt(folder: Path) -> str:
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(40))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    BioGptForCausalLM(BioGptConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128,
    )).save_pretrained(folder)  # fmt: skip
    return str(folder)


HF_TEXT = {"hf_model_name": "nobody/a-bert-of-the-hub", "hf_tokenizer_name": "nobody/a-bert-of-the-hub",
           "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 256}  # fmt: skip


def save_biomedclip(folder: Path, name: str = "open_clip_model.safetensors", **more_settings) -> str:
    """As BiomedCLIP: a ViT of timm inside an open_clip model, a small one here, in a folder as a hub would send it.
    Its text tower is a BERT, whose config lies in another repository of the hub."""
    settings = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False, "timm_pool": "",
                       "timm_proj": "linear", "image_size": 224},
    }  # fmt: skip
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    weights = open_clip.CustomTextCLIP(**settings, text_cfg=text).state_dict()
    weights = {key: value for key, value in weights.items() if not key.startswith("text.")}
    weights["text.transformer.embeddings.word_embeddings.weight"] = torch.randn(9, 8)
    weights["text.transformer.embeddings.position_ids"] = torch.arange(8)
    settings = {"model_cfg": settings | {"text_cfg": HF_TEXT} | more_settings, "preprocess_cfg": {"mean": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(weights, folder / name) if name.endswith(".safetensors") else torch.save(weights, folder / name)
    return f"local-dir:{folder}"


@pytest.mark.parametrize("name, more", [
    ("open_clip_model.safetensors", {}), ("open_clip_pytorch_model.bin", {"init_logit_bias": -10}),
])  # fmt: skip
def test_a_vision_tower_is_loaded_without_the_repository_of_its_text_tower(name, more, tmp_path):
    encoder = load_vision_encoder(save_biomedclip(tmp_path / "clip", name, **more))
    file = tmp_path / "clip" / name
    weights = load_file(file) if name.endswith(".safetensors") else torch.load(file)
    loaded = encoder.tower.state_dict()
    assert loaded.keys() == {key.removeprefix("visual.") for key in weights if key.startswith("visual.")}
    assert all(torch.equal(value, weights[f"visual.{key}"]) for key, value in loaded.items())
    assert encoder.preprocess.settings["mean"] == [0.5] * 3 and encoder.image_size == (224, 224) and encoder.dim == 192


def test_so_is_one_of_the_hub_that_is_kept_on_this_machine(tmp_path, monkeypatch):
    from huggingface_hub import constants

    kept = tmp_path / "models--nobody--clip"
    save_biomedclip(kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    here = load_vision_encoder(f"local-dir:{kept / 'snapshots' / ('0' * 40)}")
    assert load_vision_encoder("hf-hub:nobody/clip").fingerprint == here.fingerprint
    with pytest.raises(InputError, match="hf-hub:nobody/other: it is not kept on this machine"):
        load_vision_encoder("hf-hub:nobody/other")


@pytest.mark.parametrize("change, message", [
    (lambda weights: {k: v for k, v in weights.items() if k.startswith("text.")},
     r"has not the weights of its vision tower: 151 tensors are missing and 0 are not its own, such as visual\.trunk"),
    (lambda weights: weights | {"visual.trunk.extra": torch.zeros(1)}, "0 tensors are missing and 1 are not its own"),
    (lambda weights: weights | {"visual.head.proj.weight": torch.zeros(3, 3)}, "mismatch for visual.head.proj.weight"),
    (lambda weights: weights | {"visual.head.proj.weight": torch.full((16, 192), torch.nan)}, "not finite"),
    (lambda weights: None, "holds no weight file"),
])  # fmt: skip
def test_weights_that_are_not_those_of_the_vision_tower(change, message, tmp_path):
    name, file = save_biomedclip(tmp_path / "clip"), tmp_path / "clip" / "open_clip_model.safetensors"
    weights = change(load_file(file))
    file.unlink()
    if weights is not None:
        save_file(weights, file)
    with pytest.raises(InputError, match=f"cannot load the vision encoder local-dir.*{message}") as error:
        load_vision_encoder(name)
    assert len(str(error.value).splitlines()) == 1


class Killed(BaseException):
    """What no `except` of ours catches."""


def test_train_stop_resume_findings_and_evaluation(tmp_path, monkeypatch, capsys):
    data, run = write_chex(tmp_path / "data", 12), tmp_path / "run"
    backbones = ["--lm", save_biogpt(tmp_path / "biogpt"), "--clip-model-type", save_biomedclip(tmp_path / "clip")]
    shape = ("depth=1", "heads=2", "dim_head=8", "num_latents=4")
    small = [f"--set=tokenizer.{setting}" for setting in shape] + ["--set=fusion.heads=2", "--set=fusion.dim_head=8"]
    short = ["--steps=4", "--batch-size=2", "--eval-every=4", "--eval-batches=1", "--save-every=1", "--max-tokens=32",
             "--workers=0", "--device=cpu", "--dtype=float32", "--cache=off"]  # fmt: skip
    arguments = ["--preset", "medical", "--data", str(data), *backbones, *small, *short]
    train.start([*arguments, "--out", str(tmp_path / "whole")])

    write = RunLog.step

    def killed(log, step, *rest):
        write(log, step, *rest)
        if step == 2:
            raise Killed

    monkeypatch.setattr(RunLog, "step", killed)
    with pytest.raises(Killed):
        train.start([*arguments, "--out", str(run)])
    monkeypatch.undo()
    train.start(["--resume", str(run)])
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert "its annotation 999 is not there" in (run / "skipped.txt").read_text()

    capsys.readouterr()
    (tmp_path / "x.dcm").write_bytes(dicom(RAMP))
    captioning.main([str(run), str(tmp_path / "x.dcm"), "--max-new-tokens", "4"])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'x.dcm'}\t")
    evaluate.main(evaluate.parse([str(run), "--n", "2", "--shots", "--device", "cpu"]))
    assert json.loads((run / "evaluation.json").read_text())["n"] == 2
    again = FlamingoModel.from_pretrained(run)
    assert type(again.flamingo.lang_encoder).__name__ == "FlamingoBioGptForCausalLM"


def test_the_preset_is_biogpt_and_biomedclip():
    config = model_config(TrainingOptions(preset="medical"))
    assert config.language.name == "microsoft/biogpt" and "BiomedCLIP" in config.vision.name
