"""One's own data from the option to the batch: which files are read, how much a step takes of them, what is said."""

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from flamingo.config import ModelConfig, TrainingOptions
from flamingo.data.batches import Collate, StepSampler
from flamingo.data.captions import load_captions, load_set
from flamingo.data.chunks import Chunk
from flamingo.data.processor import FlamingoProcessor
from flamingo.errors import InputError
from flamingo.evaluation.test_set import captioned_test_set
from flamingo.files import asset
from flamingo.training.command_line import parse_training_options
from flamingo.training.sources import check_targets, training_sets


@pytest.fixture(scope="module")
def processor() -> FlamingoProcessor:
    return FlamingoProcessor.from_pretrained(asset("classroom/flamingo"))


def a_set(folder: Path, rows: list[dict], pictures: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(pictures):
        Image.new("RGB", (12, 9), (25 * i, 90, 120)).save(folder / f"{i}.png")
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "set.jsonl"


def captioned(count: int = 6, captions: int = 1) -> list[dict]:
    return [
        {"image": f"{i % 6}.png", "captions": [f"caption {k} of {i}" for k in range(captions)]} for i in range(count)
    ]


# ------------------------------------------------------------------------------------------------- how much at once
def test_a_step_takes_a_few_captions_of_a_picture_and_an_epoch_takes_all(tmp_path, processor):
    source = a_set(tmp_path, captioned(6, captions=100))
    train, validation = training_sets(TrainingOptions(data=str(source), captions_per_picture=8), ModelConfig())
    texts = [[text[0].caption for text in train.texts(i)] for i in range(len(train))]
    assert max(map(len, texts)) == 8
    of = lambda examples: {c for i in range(len(examples)) for t in examples.texts(i) for c in [t[0].caption]}  # noqa: E731
    assert len(of(train)) == sum(map(len, texts)) == 400 and len(of(validation)) == 200
    assert not {c.split()[-1] for c in of(train)} & {c.split()[-1] for c in of(validation)}  # no picture is in both
    batch = Collate(processor, 32)([train[i] for i in next(iter(StepSampler(train.length, len(train), 4, 1, 0)))])
    assert len(batch.labels) <= 4 * 8 and len(batch.pixel_values) == 4
    few = training_sets(TrainingOptions(data=str(source), captions_per_picture=1000), ModelConfig())[0]
    assert len(few) == 4 and len(few.texts(0)) == 100
    with pytest.raises(InputError, match="--captions-per-picture must be at least 1"):
        parse_training_options(["--captions-per-picture", "0"])


def test_what_is_cut_and_what_has_no_target_is_said_and_nothing_to_learn_is_an_error(tmp_path, processor, capsys):
    source = a_set(tmp_path, [
        *captioned(5), {"image": "5.png", "captions": ["long " * 300]},
        *({"image": f"{i}.png", "captions": ["before " * 40 + "<image> after"]} for i in range(6, 9)),
    ], pictures=9)  # fmt: skip
    sets = training_sets(TrainingOptions(data=str(source), seed=1), ModelConfig())
    capsys.readouterr()
    check_targets(*sets, Collate(processor, 30))
    assert "of 7 training examples with 7 texts, " in (said := capsys.readouterr().out) and "are cut at" in said
    with pytest.raises(InputError, match=r"no training text has a token to predict.*within --max-tokens 2"):
        check_targets(*sets, Collate(processor, 2))
    with pytest.raises(InputError, match="no training text has a token to predict"):
        check_targets(*training_sets(TrainingOptions(), ModelConfig()), Collate(processor, 1))


def test_special_tokens_in_a_caption_are_letters(processor):
    ids, _ = processor.encode_chunks([Chunk(0, "<|endofchunk|>", "a </s> dog <image><pad> runs")])
    assert ids.count(processor.media_token_id) == 1 and ids.count(processor.eoc_token_id) == 1
    begin = len(processor.begin_ids)
    assert not set(ids[begin:]) & set(processor.tokenizer.all_special_ids) - {processor.media_token_id,
                                                                              processor.eoc_token_id}  # fmt: skip
    plain = [Chunk(0, "In a sentence:", "a cat on a blue ground")]
    assert processor.decode(processor.encode_chunks(plain)[0]) == " In a sentence: a cat on a blue ground"


# ------------------------------------------------------------------------------------------------ where it is, and was
def test_a_run_folder_inside_the_data_is_refused(tmp_path, monkeypatch):
    a_set(tmp_path / "data", captioned())
    (tmp_path / "data" / "set.jsonl").rename(tmp_path / "data" / "metadata.jsonl")
    for options in ({"out": f"{tmp_path}/data/run"}, {"out": f"{tmp_path}/other/../data"}, {}):
        monkeypatch.chdir(tmp_path / "data")
        with pytest.raises(InputError, match=r"would be inside of the data .* choose an --out elsewhere"):
            training_sets(TrainingOptions(data=str(tmp_path / "data"), **options), ModelConfig())
    assert not (tmp_path / "data" / "run").exists()


@pytest.mark.parametrize("column", [{"image_column": "image"}, {"caption_columns": "caption"}, {"image_column": ""}])
def test_columns_belong_to_data(column):
    with pytest.raises(InputError, match="belong to --data: name the set"):
        training_sets(TrainingOptions(**column), ModelConfig())


def test_a_run_finds_its_data_from_anywhere_and_never_another_set_of_that_name(tmp_path, monkeypatch):
    a_set(tmp_path / "here", captioned(6))
    a_set(tmp_path / "there", captioned(3))
    monkeypatch.chdir(tmp_path / "here")
    options = parse_training_options(["--data", "set.jsonl"])
    assert options.data == "set.jsonl" and options.data_place == str(tmp_path / "here" / "set.jsonl")
    monkeypatch.chdir(tmp_path / "there")
    assert sum(map(len, load_set(options).values())) == 6
    (tmp_path / "here").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert sum(map(len, load_set(options).values())) == 6
    assert parse_training_options(["--data", "jxie/flickr8k"]).data_place is None


def test_which_files_are_used_as_which_split_is_said(tmp_path, capsys):
    for split, count in (("train", 4), ("test", 2)):
        a_set(tmp_path / split, [{"file_name": f"{i}.png", "caption": "x"} for i in range(count)], count)
        (tmp_path / split / "set.jsonl").rename(tmp_path / split / "metadata.jsonl")
    training_sets(TrainingOptions(data=str(tmp_path)), ModelConfig())
    assert ("train 2 examples (train/metadata.jsonl), test 2 examples (test/metadata.jsonl), "
            "validation 2 examples (held out of train)") in capsys.readouterr().out.replace("\n", "")  # fmt: skip


# ------------------------------------------------------------------------------------------------------- evaluation
def test_documents_whose_first_picture_has_no_caption_are_not_scored(tmp_path, capsys):
    bare = [{"images": ["0.png", f"{i}.png"], "text": "<image><image>both show dogs"} for i in range(5)]
    good = [{"images": ["5.png", f"{i}.png"], "text": "<image>one<|endofchunk|><image>two"} for i in range(6)]
    source = a_set(tmp_path / "both", [*bare, *good])
    test_set = captioned_test_set(TrainingOptions(data=str(source)), "train", 100, 0)
    assert test_set.items and test_set.support
    assert all(list(item.truths) == ["one"] for item in (*test_set.items, *test_set.support))
    assert "not scored: their first picture has no caption of its own" in capsys.readouterr().out
    with pytest.raises(InputError, match="has 0 train picture with a caption"):
        captioned_test_set(TrainingOptions(data=str(a_set(tmp_path / "none", bare))), "train", 100, 0)


# --------------------------------------------------------------------------------------------------------------- hub
def test_of_a_failed_download_the_innermost_cause_is_said(monkeypatch):
    def fail(*_, **__):
        try:
            raise OSError("no route to host\nand more")
        except OSError as cause:
            raise RuntimeError("An error occurred while generating the dataset") from cause

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"cannot load the data nobody/nothing .*: no route to host$"):
        load_captions("nobody/nothing")


def test_a_set_of_the_hub_may_not_name_files_of_this_machine(monkeypatch):
    rows = datasets.Dataset.from_dict({"image": ["/etc/hostname"] * 4, "caption": ["x"] * 4})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=rows))
    with pytest.raises(InputError, match="outside of its folder"):
        load_captions("somebody/something")
