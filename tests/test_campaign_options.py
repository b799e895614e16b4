"""A campaign of hostile options of the commands: each ends with exit code 2 and one sentence."""

import dataclasses

import pytest

import evaluate
from flamingo import __main__ as captioning
from flamingo.config import TrainingOptions
from flamingo.errors import InputError
from flamingo.fast.device import pick_device
from flamingo.presets import training_options
from flamingo.run_folder import (
    in_run_folder,
)
from flamingo.training.command_line import parse_training_options

pytestmark = pytest.mark.usefixtures("bounded_memory")


NUMBERS = ["seed", "steps", "batch_size", "accumulate", "lr", "gate_lr", "weight_decay", "warmup_steps", "clip_norm",
           "max_tokens", "eval_every", "save_every", "eval_batches", "workers", "gate_opening", "gate_reopening",
           "where_weight", "captions_per_picture", "skip_bad_steps", "patience", "patches", "lm_lr"]  # fmt: skip
WHOLE = [name for name in NUMBERS if TrainingOptions.__dataclass_fields__[name].type is int]
BAD_TRAINING = (
    [[f"--{name.replace('_', '-')}={value}"] for name in NUMBERS for value in ("-1", "1e400", "nan", "", "many")]
    + [[f"--{name.replace('_', '-')}", str(10**40)] for name in WHOLE]
    + [[f"--{name.replace('_', '-')}={value}"] for name in ("lr", "gate_lr", "clip_norm", "weight_decay")
       for value in ("inf", "-inf", "1e300")]
    + [[f"--{name.replace('_', '-')}", "0"] for name in NUMBERS
       if name not in ("seed", "weight_decay", "warmup_steps", "workers", "gate_opening", "gate_reopening",
                       "where_weight", "skip_bad_steps", "patience")]
    + [[f"--{name}", value] for name in ("out", "cache", "data", "lm", "clip-model-type", "device", "dtype", "preset",
                                         "optimizer", "image-column", "caption-columns") for value in ("", "  ")]
    + [["--seed", str(2**64)], ["--steps", str(10**12)], ["--batch-size", "9999999", "--steps", "999999999"]]
    + [["--set", text] for text in (
        "tokenizer.depth=1000000", "tokenizer.depth=0", "tokenizer.heads=-1", "tokenizer.num_latents=99999999",
        "tokenizer.init_gain=nan", "tokenizer.latents_std=inf", "tokenizer.act=tanh", "fusion.placement=middle",
        "fusion.every=0", "fusion.ff_mult=1000", "vision.feature_norm=False", "vision.dim=0", "language.name=", "=",
        "fusion.heads=1e3", "fusion.heads=1_0_0_0_0_0", "tokenizer.max_num_media=-1", "nothing", "")]
    + [["--dtype", "float16"], ["--preset", "Classroom"], ["--nonsense"], ["--steps"], ["extra"], ["--out"]]
)  # fmt: skip


@pytest.mark.parametrize("argv", BAD_TRAINING, ids=" ".join)
def test_options_of_train(argv, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = lambda *_: pytest.fail("something was built")  # noqa: E731
    refused(lambda: in_run_folder(train, parse_training_options(argv)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--lm-lr", "0.01"], "frozen"),
        (["--preset", "classroom-llava", "--lm-lr", "0.01"], "frozen"),
        (["--preset", "classroom-kosmos", "--gate-lr", "0.01"], "cross-attention"),
        (["--preset", "classroom-kosmos", "--gate-opening", "0.1"], "cross-attention"),
        (["--patches", "0.5"], "cached features"),
        (["--preset", "photos", "--data", "x", "--cache", "off", "--patches", "0.5"], "cached features"),
        (["--preset", "photos", "--data", "x", "--patches", "0.5"], "linear.shuffle"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(argv, word, refused):
    refused(lambda: parse_training_options(argv), argv[-2], word)


def test_an_option_that_is_read_is_not_refused():
    for argv in (
        ["--preset", "classroom-kosmos", "--lm-lr", "0.01"], ["--preset", "photos", "--data", "x", "--lm-lr", "0.01"],
        ["--preset", "photos-flamingo", "--data", "x", "--patches", "0.5"], ["--gate-lr", "0.01"],
        ["--set", "fusion_type=language-stream"],
    ):  # fmt: skip
        parse_training_options(argv)


def test_every_option_that_is_a_number_has_been_tried():
    numbers = [f.name for f in dataclasses.fields(TrainingOptions) if f.type in (int, float)]
    assert set(NUMBERS) == set(numbers)
    for name in numbers:
        for value in ("1", True, None, [], {}, float("nan"), float("inf"), -(10**40), 10**40):
            with pytest.raises(InputError, match=name):
                training_options({name: value})


def test_what_is_read_as_it_was_meant(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    options = parse_training_options(["--out=~/run", "--cache", "OFF", "--data", "~/x", "--seed", str(2**63 - 1)])
    assert (options.out, options.cache, options.data) == ("/somewhere/run", "off", "/somewhere/x")
    assert type(training_options({"lr": 1}).lr) is float


# --------------------------------------------------------------------------------- options of evaluate.py and captions
BAD_EVALUATION = [
    ["--n", "1"], ["--n", "-5"], ["--n", "1e8"], ["--n", str(10**30)], ["--seed", "-1"], ["--seed", str(2**64)],
    ["--queries", "1"], ["--queries", "-1"], ["--trials", "0"], ["--trials", "1000000"], ["--examples", "-1"],
    ["--shots", "-1"], ["--shots", "0", "-3"], ["--shots", "x"], ["--shots", str(10**30)], ["--demos", "best"],
    ["--zero-shot", "three"], ["--data", ""], ["--split", ""], ["--device", ""], ["--image-column", ""],
    ["--image-column", "x"], ["--caption-columns", "x"], ["--caption-columns", ""], ["--question-column", ""],
    ["--answer-column", " "], ["--label-column", ""], ["--n"], ["--nonsense"], ["again"],
]  # fmt: skip
BAD_CAPTIONING = [
    ["--beams", "0"], ["--beams", "-1"], ["--beams", "100000"], ["--beams", "x"], ["--max-new-tokens", "0"],
    ["--max-new-tokens", "-1"], ["--max-new-tokens", str(10**12)], ["--max-new-tokens", "1.5"], ["--nonsense"],
]  # fmt: skip


@pytest.mark.parametrize("argv", BAD_EVALUATION, ids=" ".join)
def test_options_of_evaluate(argv, refused, tmp_path):
    refused(lambda: evaluate.main(evaluate.parse([str(tmp_path), *argv])))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", BAD_CAPTIONING, ids=" ".join)
def test_options_of_captioning(argv, refused):
    refused(lambda: captioning.main(["run", "picture.png", *argv]))


@pytest.mark.parametrize("device", ["meta", "", "tpu", "cuda:99", "cpu:x", "cpu,cuda"])
def test_devices_that_hold_no_numbers(device):
    with pytest.raises(InputError, match="cannot be used here"):
        pick_device(device)
