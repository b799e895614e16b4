"""Chest X-rays: DICOM and deep grey pictures as they are looked at, the Chex layout, the medical fork's names, and the
whole path with backbones of the same kinds, tiny and random: train, stop, resume, findings of a picture, evaluate."""

import inspect
import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import tiny_lm
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BioGptConfig, BioGptForCausalLM, PreTrainedTokenizerFast

import evaluate
import train
from flamingo import FlamingoConfig, FlamingoModel, InputError
from flamingo import __main__ as captioning
from flamingo.config import CrossAttentionConfig, TrainingOptions
from flamingo.data.captions import load_captions
from flamingo.data.chex import Chex, read_chex
from flamingo.data.pictures import open_picture
from flamingo.data.places import Unusable
from flamingo.files import asset
from flamingo.interop import compat
from flamingo.interop.backbones import load_vision_encoder
from flamingo.model.language_model import FlamingoLayer, FlamingoLMMixin, extend_instance
from flamingo.presets import model_config
from flamingo.training.log import RunLog


# ------------------------------------------------------------------------------------------------------------ pictures
def dicom(pixels: np.ndarray | None, **fields) -> bytes:
    """A file of 16 bits a pixel, MONOCHROME2 unless a field says otherwise."""
    pydicom = pytest.importorskip("pydicom", reason="DICOM needs pydicom: pip install pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.ExplicitVRLittleEndian, "1.2.3"
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    made = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    if pixels is not None:
        made.Rows, made.Columns = pixels.shape
        made.SamplesPerPixel, made.BitsAllocated, made.BitsStored, made.HighBit = 1, 16, 16, 15
        made.PixelRepresentation, made.PhotometricInterpretation = 0, "MONOCHROME2"
        made.PixelData = pixels.astype("<u2").tobytes()
    for name, value in fields.items():
        setattr(made, name, value)
    file = io.BytesIO()
    made.save_as(file, enforce_file_format=True)
    return file.getvalue()


RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 16  # 0 … 1008


def grey(data: bytes) -> np.ndarray:
    picture = np.array(open_picture(data))
    assert (picture[..., 0] == picture[..., 1]).all() and picture.shape == (8, 8, 3)
    return picture[..., 0].astype(int)


def test_a_dicom_is_read_as_it_is_looked_at():
    plain = grey(dicom(RAMP))
    assert plain[0, 0] == 0 and plain[-1, -1] == 255 and (np.diff(plain.flatten()) >= 0).all()
    assert (grey(dicom(RAMP, PhotometricInterpretation="MONOCHROME1")) == 255 - plain).all()
    window = {"WindowCenter": 504, "WindowWidth": 201}  # 404 … 604 go from black to white
    seen = grey(dicom(RAMP, **window))
    assert (seen[RAMP <= 400] == 0).all() and (seen[RAMP >= 608] == 255).all()
    assert abs(seen[RAMP == 496].item() - 255 * (496 - 404) / 200) <= 2
    shifted = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 8, "WindowWidth": 401}
    assert abs(grey(dicom(RAMP, **shifted)) - grey(dicom(RAMP, WindowCenter=504, WindowWidth=201))).max() <= 2
    several = grey(dicom(RAMP, WindowCenter=[504, 100], WindowWidth=[201, 50]))  # the first counts
    assert (several == seen).all()
    assert (grey(dicom(np.full((8, 8), 7))) == 0).all()  # all the same


FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
WINDOWS = [{"WindowCenter": 504, "WindowWidth": 201, "VOILUTFunction": function} for function in FUNCTIONS]
WINDOWS += [{"WindowCenter": 496.5, "WindowWidth": 1}, {}]  # a step, just above one of the measurements


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_a_negative_slope_makes_the_same_picture_of_the_same_measurements(window, kind):
    upwards = grey(dicom(RAMP, RescaleSlope=1, RescaleIntercept=0, PhotometricInterpretation=kind, **window))
    downwards = dicom(1008 - RAMP, RescaleSlope=-1, RescaleIntercept=1008, PhotometricInterpretation=kind, **window)
    assert (grey(downwards) == upwards).all() and upwards.min() == 0 and upwards.max() == 255


@pytest.mark.parametrize("window", WINDOWS[:-1])
def test_windows_are_those_of_pydicom(window):
    data = dicom(RAMP, **window)
    file = pytest.importorskip("pydicom").dcmread(io.BytesIO(data))
    theirs = __import__("pydicom.pixels", fromlist=["x"]).apply_windowing(file.pixel_array, file)  # 0 … 65535
    assert abs(grey(data) - theirs / 257).max() <= 0.51
    negative = grey(dicom(RAMP, PhotometricInterpretation="MONOCHROME1", **window))
    assert abs(negative + grey(data) - 255).max() <= 1


@pytest.mark.parametrize("window", [
    {"WindowWidth": 0, "WindowCenter": 504}, {"WindowWidth": -3, "WindowCenter": 504}, {"WindowWidth": 201},
    {"WindowCenter": 504}, {"WindowWidth": 201, "WindowCenter": None}, {"WindowWidth": 0.5, "WindowCenter": 504},
    {"WindowWidth": 0, "WindowCenter": 504, "VOILUTFunction": "SIGMOID"},
    {"WindowWidth": 201, "WindowCenter": 504, "VOILUTFunction": "CUBIC"},
])  # fmt: skip
def test_a_window_that_shows_nothing_counts_as_none(window):
    assert (grey(dicom(RAMP, **window)) == grey(dicom(RAMP))).all()


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 700, "WindowWidth": 401}])
@pytest.mark.parametrize("stored, fields", [
    (65535, {"PixelPaddingValue": 65535}), (0, {"PixelPaddingValue": 0}),
    (60001, {"PixelPaddingValue": 60000, "PixelPaddingRangeLimit": 60002}),
    (60001, {"PixelPaddingValue": 60002, "PixelPaddingRangeLimit": 60000}),
    (63536, {"PixelPaddingValue": -2000, "PixelRepresentation": 1}),
])  # fmt: skip
def test_padding_is_background_and_takes_no_grey_from_the_picture(stored, fields, window, kind):
    """The first two rows are padding; the rest is as bright as in a picture that has none."""
    fields = fields | window | {"PhotometricInterpretation": kind}
    pixels = np.vstack([np.full((2, 8), stored), RAMP[2:]])
    there = grey(dicom(pixels, **fields))
    assert (there[:2] == 0).all()
    without = np.vstack([RAMP[2:4], RAMP[2:]])
    assert (there[2:] == grey(dicom(without, **fields))[2:]).all() and there[2:].max() == 255 and there[2:].min() == 0
    assert (grey(dicom(np.full((8, 8), stored), **fields)) == 0).all()  # nothing but padding


def test_padding_of_a_signed_picture_written_without_its_sign():
    """63536 for -2000, as some scanners have it; in a file whose fields name their types nobody mends it."""
    pydicom = pytest.importorskip("pydicom")
    pixels = np.vstack([np.full((2, 8), 63536), RAMP[2:]])
    wrong = pydicom.DataElement(0x00280120, "US", 63536)
    file = pydicom.dcmread(io.BytesIO(dicom(pixels, PixelRepresentation=1)))
    file.add(wrong)
    data = io.BytesIO()
    file.save_as(data)
    there = grey(data.getvalue())
    assert (there[:2] == 0).all() and there[2, 0] == 0 and there[3, 0] > 30


def colours(pixels: np.ndarray, bits: int, kind: str = "RGB", **fields) -> np.ndarray:
    """The picture (H, W, 3) of a DICOM of (H, W, 3) or of (H, W) numbers of colours."""
    deep = 8 if bits <= 8 else 16
    depth = {"BitsAllocated": deep, "BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": 0}
    several = {"SamplesPerPixel": 3, "PlanarConfiguration": 0} if pixels.ndim == 3 else {"SamplesPerPixel": 1}
    fields |= {"Rows": pixels.shape[0], "Columns": pixels.shape[1], "PhotometricInterpretation": kind}
    return np.array(open_picture(dicom(
        None, PixelData=pixels.astype(f"<u{deep // 8}").tobytes(), **depth, **several, **fields)))  # fmt: skip


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_coloured_dicom_keeps_its_colours(bits):
    white = 2**bits - 1
    pixels = np.array([[[white, 0, 0], [0, 0, white]], [[white // 2 + 1, white // 4, 0], [white] * 3]])
    seen = colours(pixels, bits)
    assert seen[0].tolist() == [[255, 0, 0], [0, 0, 255]] and seen[1, 1].tolist() == [255, 255, 255]
    assert seen[1, 0, 0] == 128 and abs(int(seen[1, 0, 1]) - 64) <= 1


def test_brightness_and_colour_apart_are_put_together():
    """YBR_FULL, as most packed colours are: (Y, Cb, Cr) of red, of green, and of grey."""
    red, green, mid = [76, 85, 255], [150, 44, 21], [99, 128, 128]
    seen = colours(np.array([[red, green], [mid, mid]]), 8, "YBR_FULL").astype(int)
    assert abs(seen[0] - [[255, 0, 0], [0, 255, 0]]).max() <= 2 and (seen[1] == 99).all()


@pytest.mark.parametrize("bits, stored", [(8, "<u1"), (16, "<u2"), (8, "<u2")])
def test_a_palette_gives_its_colours(bits, stored):
    """Four colours, numbered from 3; what is below has the first, what is beyond the last."""
    white = 2**bits - 1
    tables = np.array([[white, 0, 0], [0, white, 0], [0, 0, white], [white, white, 0]], dtype=stored).T
    names = ("Red", "Green", "Blue")
    palette = {f"{name}PaletteColorLookupTableData": table.tobytes() for name, table in zip(names, tables, strict=True)}
    palette |= {f"{name}PaletteColorLookupTableDescriptor": [4, 3, bits] for name in names}
    seen = colours(np.array([[3, 4, 5], [6, 0, 259]]), 16, "PALETTE COLOR", **palette)
    red, green, blue, yellow = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]
    assert seen.tolist() == [[red, green, blue], [yellow, red, yellow]]
    with pytest.raises(Unusable, match="is a DICOM of palette colours without its palette"):
        colours(np.array([[3, 4]]), 8, "PALETTE COLOR")


@pytest.mark.parametrize("made, message", [
    (lambda: dicom(None), "is a DICOM without pixels"),
    (lambda: dicom(RAMP, NumberOfFrames=3), "is a DICOM of 3 frames"),
    (lambda: dicom(RAMP, Rows=60000, Columns=60000), "is 60000 x 60000 pixels"),
    (lambda: dicom(RAMP)[:-9], "cannot be read as a picture"), (lambda: dicom(RAMP)[:140], "without pixels"),
    (lambda: b"\0" * 128 + b"DICM" + b"nonsense" * 9, "DICOM|cannot be read"),
])  # fmt: skip
def test_dicoms_that_cannot_be_read(made, message):
    with pytest.raises(Unusable, match=message):
        open_picture(made())


def test_a_dicom_without_pydicom_names_the_package(monkeypatch):
    data = dicom(RAMP)
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(Unusable, match="pip install pydicom"):
        open_picture(data)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_deep_grey_pictures_use_all_of_black_to_white(bits):
    """An X-ray of 12 bits in a PNG of 16 would be nearly black if it were divided by 65535."""
    values = (np.linspace(0, 1, 64) * (2**bits - 1)).astype(np.uint16).reshape(8, 8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    assert abs(grey(file.getvalue()) - np.linspace(0, 255, 64).reshape(8, 8)).max() <= 1.5


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
