"""A campaign of hostile options, configurations and run folders: each ends with exit code 2 and one sentence, and
leaves the folder as it was."""

import contextlib
import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_flamingo
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate
from flamingo import __main__ as captioning
from flamingo.config import ModelConfig, TrainingOptions
from flamingo.data.batches import StepSampler
from flamingo.errors import InputError, run_command
from flamingo.fast.device import pick_device
from flamingo.files import UNFINISHED, asset, write_atomically, write_json
from flamingo.interop.backbones import _backbone_samples, build_flamingo, load_language_model, load_vision_encoder
from flamingo.limits import checked, machine_memory
from flamingo.presets import PRESETS, model_config, training_options
from flamingo.run_folder import (
    LOCK,
    METRICS,
    RESUME_POINT,
    SUMMARY,
    held,
    in_run_folder,
    new,
    read_metrics,
    read_summary,
)
from flamingo.settings import FLAT, from_flat, paths, to_flat
from flamingo.training import loop
from flamingo.training.checkpoint import load_model, read_config
from flamingo.training.command_line import parse_training_options
from flamingo.training.optimizer import make_optimizer
from flamingo.training.resume import ResumePoints, read_facts

pytestmark = pytest.mark.usefixtures("bounded_memory")

ROOT = Path(__file__).resolve().parent.parent
# A command that a shell started in the background ignores Ctrl-C, and so would its children.
HEARS_CTRL_C = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
ASSETS = asset("classroom/flamingo")


@pytest.fixture
def refused(capsys):
    """`refused(command, *words)`: the command ends with exit code 2 and one sentence that has all the words."""

    def check(command, *words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command("it", command)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1, said
        assert all(word in said for word in words), said
        return said

    return check


# ------------------------------------------------------------------------------------------------- options of train.py
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
                                         "image-column", "caption-columns") for value in ("", "  ")]
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


# ----------------------------------------------------------------------------------------------------- seeded mutation
ODD = [None, True, False, 0, -1, 1.5, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", "false", "1", "\0", "x",
       [], [1], {}, {"a": 1}, "x" * 5000]  # fmt: skip


def mutants(value: dict, seed: int, count: int):
    """Copies of a JSON object with one or two things wrong: a field of another kind, missing or new."""
    rng = random.Random(seed)
    for _ in range(count):
        copied = copy.deepcopy(value)
        for _ in range(rng.choice((1, 1, 2))):
            inner = [copied, *(v for v in copied.values() if isinstance(v, dict))]
            place = rng.choice(inner)
            name = rng.choice(sorted(place) or ["x"])
            kind = rng.random()
            if kind < 0.75:
                place[name] = copy.deepcopy(rng.choice(ODD))
            elif kind < 0.9:
                place.pop(name, None)
            else:
                place[f"{name}{rng.choice(('', ' ', 's'))}"] = rng.choice(ODD)
        yield copied


def torn(text: str, seed: int, count: int):
    """A file's text cut short, or with bytes changed or put in."""
    rng, raw = random.Random(seed), text.encode()
    for _ in range(count):
        at, kind = rng.randrange(len(raw)), rng.random()
        if kind < 0.3:
            yield raw[:at]
        elif kind < 0.7:
            yield raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        else:
            yield raw[:at] + rng.choice((b"[" * 100_000, b"\xff", b"{", b"9" * 5000, b"NaN", b"\0")) + raw[at:]


def refused_or_sound(read, sound) -> bool:
    """A reader refuses in one sentence (True), or what it returns is sound (False). Nothing else may happen."""
    try:
        value = read()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return True
    sound(value)
    return False


def test_mutated_configs(tmp_path):
    original = json.loads((ASSETS / "config.json").read_text())
    file = tmp_path / "config.json"

    def sound(config: ModelConfig) -> None:
        assert to_flat(from_flat(to_flat(config))) == to_flat(config)
        for path, value in paths(config).items():
            assert value == value and not isinstance(value, (list, dict)), path

    def outcome(content: bytes) -> bool:
        file.write_bytes(content)
        return refused_or_sound(lambda: read_config(tmp_path), sound)

    caught = [outcome(json.dumps(mutant).encode()) for mutant in mutants(original, seed=1, count=300)]
    caught += [outcome(content) for content in torn(json.dumps(original), seed=2, count=100)]
    assert sum(caught) > 250  # the others are other models, or fields that transformers writes and nobody reads


def test_every_field_of_a_config_is_checked():
    """A value of another kind in any field; and "false" is not False."""
    for name in FLAT:
        wrong = [
            value
            for value in (True, "x", [], {}, 1.5, float("nan"), -1)
            if not fits(paths(ModelConfig())[FLAT[name]], value)
        ]
        for value in wrong:
            with pytest.raises(InputError, match=name):
                from_flat({name: value})
    with pytest.raises(InputError, match="vision_feature_norm must be true or false, not 'false'"):
        from_flat({"vision_feature_norm": "false"})


def fits(default, value) -> bool:
    return type(value) is type(default) or (default is None and type(value) in (int, str)) or (
        type(default) is float and value == 1.5
    )  # fmt: skip


def test_mutated_summaries(tmp_path):
    original = json.loads((ASSETS / "summary.json").read_text())
    assert read_summary(ASSETS)[1].steps == original["steps"]  # written before some options existed

    def sound(read: tuple) -> None:
        assert training_options(dataclasses.asdict(read[1])) == read[1]

    def outcome(content: bytes) -> bool:
        (tmp_path / SUMMARY).write_bytes(content)
        return refused_or_sound(lambda: read_summary(tmp_path), sound)

    caught = [outcome(json.dumps(mutant).encode()) for mutant in mutants(original, seed=3, count=200)]
    caught += [outcome(content) for content in torn(json.dumps(original), seed=4, count=50)]
    assert sum(caught) > 150


def facts_file(folder: Path, facts: dict | str) -> None:
    text = facts if isinstance(facts, str) else json.dumps(facts)
    save_file({"x": torch.zeros(1)}, folder / RESUME_POINT, metadata={"resume": text})


GOOD_FACTS = {"step": 3, "dtype": "float32", "options": dataclasses.asdict(TrainingOptions()),
              "backbones": "0" * 16, "data": "0" * 16, "tensors": "0" * 16}  # fmt: skip


def test_mutated_facts_of_a_resume_point(tmp_path):
    facts_file(tmp_path, GOOD_FACTS)
    assert read_facts(tmp_path)["options"] == training_options({})
    file, caught = tmp_path / RESUME_POINT, []
    whole = file.read_bytes()

    def sound(facts: dict) -> None:
        assert 0 <= facts["step"] <= facts["options"].steps and facts["dtype"] in ("float32", "bfloat16")

    for mutant in mutants(GOOD_FACTS, seed=5, count=200):
        facts_file(tmp_path, mutant)
        caught.append(refused_or_sound(lambda: read_facts(tmp_path), sound))
    for content in torn(json.dumps(GOOD_FACTS), seed=6, count=30):
        facts_file(tmp_path, content.decode("utf-8", errors="replace").replace("\0", " "))
        caught.append(refused_or_sound(lambda: read_facts(tmp_path), sound))
    rng = random.Random(7)
    for _ in range(70):  # the file itself: header lengths, cut short
        at = rng.randrange(len(whole))
        changed = whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :]
        file.write_bytes(rng.choice((changed, whole[:at], whole[:8], b"", b"\x80\x04\x95pickle")))
        caught.append(refused_or_sound(lambda: read_facts(tmp_path), sound))
    assert sum(caught) > 200


def test_mutated_metrics(tmp_path):
    step = {"step": 1, "loss": 3.5, "lr": 1e-3, "captions": 8, "seconds": 1.5}
    seen = {"step": 1, "val_loss": 3.0, "val_loss_blind": 3.1, "attn": [0.1, -0.2], "ff": [0.0, 0.0]}
    file, caught = tmp_path / METRICS, []

    def sound(entries: list) -> None:
        assert all(entry["step"] <= 9 and entry.keys() >= {"step"} for entry in entries)

    for number, mutant in enumerate([*mutants(step, seed=8, count=60), *mutants(seen, seed=9, count=60)]):
        file.write_text("".join(json.dumps(entry) + "\n" for entry in (step, seen, mutant, step)))
        caught.append(refused_or_sound(lambda: read_metrics(file, 9), sound))
        assert number == 0 or caught
    for content in torn("".join(json.dumps(entry) + "\n" for entry in (step, seen, step)), seed=10, count=60):
        file.write_bytes(content)
        caught.append(refused_or_sound(lambda: read_metrics(file, 9), sound))
    assert sum(caught) > 90


# ---------------------------------------------------------------------------------------------- who has the run folder
def options(**given) -> TrainingOptions:
    return training_options(
        PRESETS["classroom"]["training"] | {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


HOLDER = """
import sys, time
from pathlib import Path
from flamingo.run_folder import new
with new(Path(sys.argv[1])) as folder:
    (folder / ".unfinished-x-resume.safetensors").write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_claimed_before_anything_is_built_and_a_kill_frees_it(tmp_path, refused, monkeypatch):
    folder, built = tmp_path / "deep" / "run", []
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    monkeypatch.setattr("flamingo.run_folder.PATIENCE", 0.1)
    refused(lambda: in_run_folder(lambda *_: built.append(1), options(out=folder)), "in use by another command")
    assert built == [] and any(name.startswith(UNFINISHED) for name in names(folder))  # not ours to take away
    holder.kill()
    holder.communicate()
    in_run_folder(lambda _, claimed: built.append(names(claimed)), options(out=folder))
    assert built == [[LOCK]]  # what the killed one left half-written is gone
    assert folder.is_dir() and names(folder) == []


def test_a_command_that_makes_nothing_of_its_folder_leaves_none(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fails(_, folder: Path) -> None:
        (folder / METRICS).touch()
        (folder / "skipped.txt").write_text("1.jpg\n")
        raise InputError("the data are no data")

    refused(lambda: in_run_folder(fails, options(out="a/b/c")), "no data")
    refused(lambda: in_run_folder(fails, options()), "no data")
    assert names(tmp_path) == []


def test_killed_before_the_first_resume_point_starting_again_works(tmp_path):
    folder = tmp_path / "run"
    for left in (
        {},
        {LOCK: ""},
        {LOCK: "", METRICS: ""},
        {METRICS: "", "skipped.txt": "1.jpg\n"},
        {f"{UNFINISHED}3": "x"},
    ):
        folder.mkdir(exist_ok=True)
        for name, text in left.items():
            (folder / name).write_text(text)
        in_run_folder(lambda _, claimed: (claimed / RESUME_POINT).write_text("x"), options(out=folder))
        assert not [name for name in names(folder) if name.startswith(UNFINISHED)]
        shutil.rmtree(folder)


@pytest.mark.parametrize("left", [
    {SUMMARY: "{}"}, {RESUME_POINT: "x"}, {METRICS: '{"step": 1}\n'}, {"skipped.txt": "mine"}, {"holiday.jpg": "x"},
    {METRICS: "", "notes.txt": "x"}, {"model.safetensors": "x"}, {".hidden": "x"}, {"sub/x": "x"},
])  # fmt: skip
def test_a_folder_that_holds_something_is_left_alone(left, tmp_path, refused):
    for name, text in left.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = names(tmp_path)
    refused(lambda: in_run_folder(lambda *_: pytest.fail("built"), options(out=tmp_path)), "is not empty")
    assert names(tmp_path) == before


def test_places_that_are_no_folders(tmp_path, refused):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/run", "x" * 300, "x/" * 3000):
        refused(lambda out=out: in_run_folder(lambda *_: pytest.fail("built"), options(out=tmp_path / out)))
    assert names(tmp_path) == ["file"]
    refused(lambda: evaluate.main(evaluate.parse([str(tmp_path)])), "no finished run")
    refused(lambda: evaluate.main(evaluate.parse([str(tmp_path / "nowhere")])), "no such run folder")
    refused(lambda: parse_training_options(["--resume", str(tmp_path)]), "start it again without --resume")
    assert names(tmp_path) == ["file"]


def read_only(folder: Path, monkeypatch) -> None:
    """As on a disk that is mounted read-only: a superuser's tests cannot make one by permissions."""
    really = os.open

    def open_(path, flags, *rest, **named):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(path).startswith(str(folder)):
            raise OSError(30, "Read-only file system", str(path))
        return really(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", open_)


def test_a_read_only_folder(tmp_path, refused, monkeypatch):
    facts_file(tmp_path, GOOD_FACTS)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / SUMMARY).write_text("{}")
    (tmp_path / "empty").mkdir()
    before = [names(path) for path in (tmp_path, tmp_path / "done", tmp_path / "empty")]
    read_only(tmp_path, monkeypatch)
    never = lambda *_: pytest.fail("built")  # noqa: E731
    for command in (
        lambda: in_run_folder(never, parse_training_options(["--resume", str(tmp_path)])),
        lambda: in_run_folder(never, options(out=tmp_path / "empty")),
        lambda: evaluate.main(evaluate.parse([str(tmp_path / "done")])),
        lambda: write_json(tmp_path / "x.json", {}),
    ):
        refused(command, "cannot write", "Read-only file system")
    assert [names(path) for path in (tmp_path, tmp_path / "done", tmp_path / "empty")] == before


def test_names_of_runs_go_on_where_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = []
    with held_new("runs/classroom"):
        in_run_folder(lambda _, folder: got.append(str(folder)), options())
    (tmp_path / "runs" / "classroom").mkdir(parents=True, exist_ok=True)
    (tmp_path / "runs" / "classroom" / SUMMARY).write_text("{}")
    in_run_folder(lambda _, folder: got.append(str(folder)), options())
    assert got == ["runs/classroom-2", "runs/classroom-2"]


@contextlib.contextmanager
def held_new(folder: str):
    with new(Path(folder)):
        yield


# ------------------------------------------------------------------------------------------- what is finite, what fits
@pytest.fixture
def points(tmp_path) -> ResumePoints:
    """Of a tiny model after a step."""
    model = tiny_flamingo()
    model.backbone_samples = _backbone_samples(model)  # as of a model whose backbones have names
    adamw = make_optimizer(model, TrainingOptions())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    adamw.step()
    return ResumePoints(tmp_path, model, adamw, TrainingOptions(), ModelConfig(), (Captions("a dog"),))


def test_a_state_that_is_not_finite_is_never_kept_nor_taken_up(points, tmp_path):
    points.save(1, "float32")
    whole = (tmp_path / RESUME_POINT).read_bytes()
    assert points.restore() == (1, "float32")
    with torch.no_grad():
        points.model.perceiver.latents[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"after step 2, the run's state has values that are not finite .*step 1"):
        points.save(2, "float32")
    assert (tmp_path / RESUME_POINT).read_bytes() == whole and names(tmp_path) == [RESUME_POINT]
    tensors = load_file(tmp_path / RESUME_POINT)
    name = next(name for name in tensors if name.endswith("exp_avg"))
    rewrite(tmp_path, tensors | {name: tensors[name] * float("inf")})
    with pytest.raises(InputError, match="not finite"):
        points.restore()


def rewrite(folder: Path, tensors: dict) -> None:
    with safe_open(folder / RESUME_POINT, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, folder / RESUME_POINT, metadata=metadata)


@pytest.mark.parametrize("damage", [
    lambda t: {n: v for n, v in t.items() if not n.startswith("optimizer.")},
    lambda t: {n: v for n, v in t.items() if not n.startswith("optimizer.0.")},
    lambda t: {n: v for n, v in t.items() if not n.endswith("exp_avg_sq")},
    lambda t: {n: v for n, v in t.items() if not n.endswith(".step")},
    lambda t: {n: v.flatten()[:1].clone() if n.endswith("exp_avg") else v for n, v in t.items()},
    lambda t: {n: v.half() for n, v in t.items()},
    lambda t: t | {"optimizer.999.exp_avg": torch.zeros(3)},
    lambda t: {n: v for n, v in t.items() if n != "model.perceiver.latents"},
], ids=["none", "not the first", "half", "no step", "other shapes", "dtype", "one more", "no latents"])  # fmt: skip
def test_an_optimizer_state_that_is_not_whole(damage, points, tmp_path):
    points.save(1, "float32")
    rewrite(tmp_path, damage(load_file(tmp_path / RESUME_POINT)))
    with pytest.raises(InputError, match="tensors are missing or of another shape"):
        points.restore()


class Captions:
    """As much of a captioned set as a resume point looks at."""

    curriculum, fingerprint = (), "of the pictures"

    def __init__(self, *captions: str):
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def texts(self, index: int) -> list[str]:
        return [self.captions[index]]


def test_data_or_backbones_that_have_changed_since(points, tmp_path):
    def of(captions: Captions, config: ModelConfig) -> ResumePoints:
        return ResumePoints(tmp_path, points.model, points.optimizer, points.options, config, (captions,))

    of(Captions("a dog", "a cat"), ModelConfig()).save(1, "float32")
    assert of(Captions("a dog", "a cat"), ModelConfig()).restore() == (1, "float32")
    other = from_flat({"lm_fingerprint": "0123456789abcdef"})
    for captions, config, what in (
        (Captions("a dog", "a cow"), ModelConfig(), "pictures or captions have changed"),
        (Captions("a dog"), ModelConfig(), "pictures or captions have changed"),
        (Captions("a dog", "a cat"), other, "backbones or architecture have changed"),
    ):
        with pytest.raises(InputError, match=what):
            of(captions, config).restore()


@pytest.mark.parametrize("loss, norm, what", [
    (float("nan"), 1.0, "the loss of step 3 is nan"), (float("inf"), 1.0, "the loss of step 3 is inf"),
    (1.0, float("nan"), "the gradient's norm of step 3 is nan"), (1.0, float("-inf"), "the gradient's norm"),
])  # fmt: skip
def test_a_step_that_is_not_finite_ends_the_run(loss, norm, what, points, tmp_path):
    facts_file(tmp_path, GOOD_FACTS)
    examples = Captions(*"abcdefgh")
    examples.length = lambda index: 1
    points.options = options(batch_size=2, accumulate=2, seed=5)
    assert loop.finite_loss(2, torch.tensor(1.5), torch.tensor(0.5), examples, points, 0) == 1.5
    with pytest.raises(InputError, match=what) as stopped:
        loop.finite_loss(2, torch.tensor(loss), torch.tensor(norm), examples, points, 0)
    steps = list(StepSampler(examples.length, 8, 2, steps=6, seed=5))
    read = ", ".join(map(str, [*steps[4], *steps[5]]))
    assert f"(training examples {read})" in str(stopped.value) and "keeps the state of step 3" in str(stopped.value)


class Sized(Captions):
    """Many examples, none of which is looked at."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> None:
        return None


class OneText:
    """Stands in for a batch: one text of 20 tokens, one small picture."""

    input_ids = torch.zeros(1, 20, dtype=torch.long)

    def inputs(self) -> dict:
        return {"input_ids": self.input_ids, "pixel_values": torch.zeros(1, 1, 3, 64, 64)}


def fitting(train: int, validation: int, **given) -> int:
    return loop.validation_batches(
        options(**given), tiny_flamingo(), lambda _: OneText(), Sized(train), Sized(validation)
    )


def test_what_does_not_fit_into_memory_is_said_and_what_there_is_bounds_the_rest():
    if machine_memory() is None:
        pytest.skip("Python does not tell how much memory there is")
    assert fitting(100, 40, batch_size=8, eval_batches=10**9) == 5
    assert fitting(100, 3, batch_size=8, eval_batches=4) == 1
    for given, what in (
        ({"train": 10**9, "validation": 10**9, "eval_batches": 10**8}, "batches of validation would take"),
        ({"train": 10**13, "validation": 100}, "the order of 10,000,000,000,000 examples would take"),
        ({"train": 10**8, "validation": 100, "batch_size": 10**7}, "--batch-size 10,000,000 would take"),
    ):
        with pytest.raises(InputError, match=what):
            fitting(**given)


# ------------------------------------------------------------------------------------------- backbones and run folders
def changed_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def without(*patterns: str):
    def damage(folder: Path) -> None:
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return damage


def code_of_its_own(folder: Path, model_type: str) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    changed_config(folder, model_type=model_type, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})


def tensors_changed(change):
    def damage(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return damage


def shortened(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")


BAD_LANGUAGE_MODELS = {
    "no tokenizer": (without("*token*"), "no tokenizer"),
    "code of its own": (lambda f: code_of_its_own(f, "evil"), "code of its own, which is never run"),
    "no config": (without("config.json"), "cannot load"),
    "no weights": (without("*.safetensors"), "cannot load"),
    "cut short": (shortened, "cannot load"),
    "pickle": (as_pickle, "cannot load"),
    "larger vocabulary": (lambda f: changed_config(f, vocab_size=99999), "cannot load"),
    "small vocabulary": (lambda f: changed_config(f, vocab_size=7), "cannot load"),
    "negative vocabulary": (lambda f: changed_config(f, vocab_size=-1), "cannot load"),
    "words for a vocabulary": (lambda f: changed_config(f, vocab_size="many"), "cannot load"),
    "no layers": (lambda f: changed_config(f, num_hidden_layers="x"), "cannot load"),
    "more layers than weights": (lambda f: changed_config(f, num_hidden_layers=9), "lacks"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "cannot load"),
    "config cut short": (lambda f: (f / "config.json").write_text('{"model'), "cannot load"),
    "tokenizer cut short": (lambda f: (f / "tokenizer.json").write_text('{"ver'), "cannot load"),
    "not a number": (tensors_changed(lambda t: {n: v * float("nan") for n, v in t.items()}), "not finite"),
    "a tensor missing": (tensors_changed(lambda t: dict(list(sorted(t.items()))[1:])), "lacks 1 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage, word", BAD_LANGUAGE_MODELS.values(), ids=BAD_LANGUAGE_MODELS)
def test_damaged_language_models(damage, word, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    folder = shutil.copytree(asset("classroom/opt"), tmp_path / "opt")
    damage(folder)
    refused(lambda: load_language_model(str(folder)), "cannot load the language model", word)
    assert not (folder / "ran").exists() and not (ROOT / "ran").exists()


def test_a_known_kind_of_model_is_loaded_without_the_code_beside_it(tmp_path):
    folder = shutil.copytree(asset("classroom/opt"), tmp_path / "opt")
    code_of_its_own(folder, "opt")
    assert load_language_model(str(folder))[0].config.hidden_size == 192
    assert not (folder / "ran").exists()


def test_texts_longer_than_the_positions_are_refused_before_weights_are_read(monkeypatch, refused):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("read"))
    build = lambda: build_flamingo(model_config(options()), max_tokens=513)  # noqa: E731
    refused(build, "--max-tokens 513", "its 512 positions")


@pytest.mark.parametrize("name", ["/nope", "./nope", "~/nope/nope", "../nope"])
def test_a_missing_folder_is_called_a_folder(name):
    for load in (load_language_model, load_vision_encoder):
        with pytest.raises(InputError, match=r"there is no folder .*nope"):
            load(name if load is load_language_model else f"{name}/x")


@pytest.mark.parametrize("damage", [shortened, without("*.safetensors"), without("open_clip_config.json"),
                                    tensors_changed(lambda t: {n: v * float("nan") for n, v in t.items()}),
                                    lambda f: (f / "open_clip_config.json").write_text("[]"),
                                    lambda f: (f / "open_clip_config.json").write_text('{"model_cfg": {}}')],
                         ids=["cut short", "no weights", "no config", "not a number", "list", "empty"])  # fmt: skip
def test_damaged_vision_encoders(damage, tmp_path, refused):
    folder = shutil.copytree(asset("classroom/clip"), tmp_path / "clip")
    damage(folder)
    refused(lambda: load_vision_encoder(f"local-dir:{folder}"))


def test_an_architecture_that_does_not_fit_is_counted_and_not_built(monkeypatch):
    monkeypatch.setattr("flamingo.interop.backbones.build_from_parts", lambda *_: pytest.fail("it was built"))
    overrides = ["tokenizer.depth=512", "tokenizer.heads=1024", "tokenizer.dim_head=4096", "tokenizer.ff_mult=64"]
    with pytest.raises(InputError, match=r"the trained parts would take [\d,.]+ GiB, and this machine has"):
        build_flamingo(model_config(options(overrides=overrides)))


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    """A finished run: the committed one."""
    folder = tmp_path_factory.mktemp("run") / "classroom"
    return Path(shutil.copytree(ASSETS, folder))


def in_place_of(name: str, make):
    return lambda folder: ((folder / name).unlink(), make(folder / name))


BAD_RUNS = {
    "weights are a pipe": in_place_of("model.safetensors", os.mkfifo),
    "config is a pipe": in_place_of("config.json", os.mkfifo),
    "weights from elsewhere": lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../elsewhere.safetensors"}}'
    ),
    "an adapter of nothing": lambda f: changed_config(f, adapters={"x": {}}),
    "an adapter without its kind": lambda f: changed_config(f, adapters={"x": {"r": 10**9}}),
    "adapters in a list": lambda f: changed_config(f, adapters=[1]),
    "an adapter that is a number": lambda f: changed_config(f, adapters={"x": 1}),
    "a dtype that is none": lambda f: changed_config(f, dtype="float99"),
    "an old dtype that is none": lambda f: changed_config(f, torch_dtype=16),
    "values that are no numbers": tensors_changed(lambda t: {n: v * float("nan") for n, v in t.items()}),
    "cut short": shortened,
    "another depth": lambda f: changed_config(f, resampler_depth=3),
    "a huge depth": lambda f: changed_config(f, resampler_depth=10**6),
    "false in words": lambda f: changed_config(f, vision_feature_norm="false"),
    "another kind": lambda f: changed_config(f, model_type="opt"),
    "weights are a folder": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
    "config is a folder": lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD_RUNS.values(), ids=BAD_RUNS)
def test_damaged_runs(damage, a_run, tmp_path, refused):
    folder = Path(shutil.copytree(a_run, tmp_path / "run"))
    damage(folder)
    refused(lambda: load_model(folder))


def test_captions_of_good_pictures_are_not_lost_to_a_bad_one(a_run, tmp_path, capsys):
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    pictures = [str(tmp_path / name) for name in ("good.png", "bad.png", "none.png", "good.png")]
    with pytest.raises(SystemExit) as ended:
        run_command("it", lambda: captioning.main([str(a_run), *pictures, "--max-new-tokens", "4"]))
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and "2 of 4 pictures could not be captioned" in err and "Traceback" not in err
    assert out.count(f"{pictures[0]}\t") == 2 and "bad.png" in err and "none.png" in err
    for prompt, more in (
        ("<image>", []),
        ("a <|endofchunk|>", []),
        ("half a letter \udcff", []),
        ("word " * 3000, []),
        ("", ["--max-new-tokens", "9999"]),
    ):
        with pytest.raises(InputError, match="--prompt"):
            captioning.main([str(a_run), pictures[0], "--prompt", prompt, *more])


# ------------------------------------------------------------------------------------------------- a full disk, Ctrl-C
def test_pipes_in_the_place_of_files_are_not_waited_for(tmp_path):
    for name in (RESUME_POINT, METRICS, SUMMARY):
        os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="no regular file"):
        read_metrics(tmp_path / METRICS, 9)
    with pytest.raises(InputError, match="no regular file"):
        read_summary(tmp_path)
    (tmp_path / SUMMARY).unlink()
    with pytest.raises(InputError, match="no regular file"):
        read_facts(tmp_path)


def test_a_temporary_file_that_cannot_even_be_made(tmp_path, refused):
    refused(lambda: write_atomically(tmp_path / "nowhere" / "x", lambda _: None), "cannot write")
    refused(lambda: write_json(tmp_path / ("x" * 300), {}), "cannot write")


def test_what_the_disk_or_the_memory_refuses_is_a_sentence_and_our_own_mistakes_are_not(refused):
    def raises(error: Exception):
        def command() -> None:
            raise error

        return command

    refused(raises(OSError(28, "No space left on device", "metrics.jsonl")), "metrics.jsonl: No space left on device")
    refused(raises(OSError(28, "No space left on device")), "No space left")
    refused(raises(MemoryError()), "out of memory")
    refused(raises(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")), "out of memory")
    for error in (OSError(2, "No such file"), RuntimeError("shapes"), ValueError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            run_command("it", raises(error))


SCRIPT = """
import os, signal, sys
from flamingo.errors import run_command, way_on
def command():
    with way_on(lambda: "give it again"):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(10**9): pass
        except BaseException:  # as some libraries do
            pass
        print("it went on")
run_command("it", command)
"""


def test_ctrl_c_cannot_be_swallowed_and_names_the_command_that_goes_on():
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, **HEARS_CTRL_C)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "\nit: stopped; give it again\n")


STOPPED = """
import os, signal, sys
from flamingo.errors import run_command
from flamingo.presets import training_options
from flamingo.run_folder import in_run_folder
def train(_, folder):
    for name in sys.argv[2:]:
        (folder / name).write_text("x")
    number = getattr(signal, os.environ.get("STOP", "SIGINT"))
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # an impatient user
run_command("it", lambda: in_run_folder(train, training_options({"out": sys.argv[1]})))
"""


@pytest.mark.parametrize("written, word", [
    ([], "there is nothing to go on with yet: give the same command again"),
    ([METRICS, RESUME_POINT], "python train.py --resume {} goes on"),
    ([RESUME_POINT, SUMMARY], "the run is finished: python evaluate.py {}"),
])  # fmt: skip
def test_what_ctrl_c_says_where_a_run_is(written, word, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", STOPPED, folder, *written]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **HEARS_CTRL_C)
    assert result.returncode == 130 and result.stderr.startswith(f"\nit: stopped; {word.format(folder)}")
    assert names(folder) == sorted([LOCK, *written])
    with held(folder):  # the lock ended with its process
        pass
    assert names(folder) == sorted(set(written) - ({RESUME_POINT} if SUMMARY in written else set()))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_polite_kill_and_a_closed_terminal_are_heard_like_ctrl_c(name, tmp_path):
    command = [sys.executable, "-c", STOPPED, tmp_path / "run", METRICS, RESUME_POINT]
    environment = os.environ | {"STOP": name}
    heard = {"preexec_fn": lambda: signal.signal(getattr(signal, name), signal.SIG_DFL)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, **heard)
    assert result.returncode == 128 + getattr(signal, name)
    assert (
        result.stderr
        == f"\nit: stopped; python train.py --resume {tmp_path / 'run'} goes on from the last point that was kept\n"
    )
    ignored = HEARS_CTRL_C | {"preexec_fn": lambda: signal.signal(getattr(signal, name), signal.SIG_IGN)}
    again = [sys.executable, "-c", STOPPED, tmp_path / "again", SUMMARY]  # as under nohup: it goes on
    assert subprocess.run(again, cwd=ROOT, env=environment, **ignored).returncode == 0


PRINTS = """
import sys
from flamingo.errors import run_command
run_command("it", lambda: [print("line", flush=len(sys.argv) > 1) for _ in range(9)])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="its pipes break otherwise")
@pytest.mark.parametrize("flushed", [[], ["at once"]])
def test_output_that_nobody_reads_ends_a_command_in_one_sentence(flushed):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", PRINTS, *flushed]
    result = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "it: stopped, for nobody reads its output any more\n")
    closed = subprocess.run([*command[:2], PRINTS], cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert closed.returncode == 0 and closed.stderr == b""


def test_letters_that_a_terminal_does_not_have_are_written_otherwise():
    code = "from flamingo.errors import run_command; run_command('it', lambda: print('ein Bär \U0001f43b'))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=environment)
    assert (result.returncode, result.stdout) == (0, b"ein B\\xe4r \\U0001f43b\n")


def test_checked_says_what_it_wants():
    for value, kind, words in (
        ("3", int, "must be a whole number, not '3'"), (True, float, "must be a number, not True"),
        (10**5000, int, "must be at most"), (10**5000, float, "must be at most"), ("a\0", str, "zero byte"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            checked("x", value, kind)


# -------------------------------------------------------------------------------------------------------- real commands
SHORT = ["--batch-size", "2", "--eval-batches", "1", "--eval-every", "9", "--device", "cpu", "--dtype", "float32"]


def start(*arguments, **how) -> subprocess.Popen:
    words = [sys.executable, ROOT / "train.py", *map(str, arguments)]
    how |= {"cwd": ROOT, "env": os.environ | {"HF_HUB_OFFLINE": "1"}, "text": True}
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **(HEARS_CTRL_C | how))


def one_sentence(process: subprocess.Popen, *words: str) -> None:
    """The last line that is not the progress bar's, for that ends without a new line."""
    said = process.communicate()[1]
    assert process.returncode == 2 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1].rpartition("\r")[2]
    assert "train.py: " in last and all(word in last for word in words), said


def test_a_run_that_leaves_the_finite_numbers_ends_and_its_last_good_state_is_kept(tmp_path):
    folder = tmp_path / "run"
    wild = ["--lr", "1e6", "--gate-lr", "1e6", "--clip-norm", "1e30", "--warmup-steps", "0", "--save-every", "1"]
    one_sentence(start(*SHORT, "--steps", "9", *wild, "--out", folder), "training examples", "keeps the state of step")
    tensors = load_file(folder / RESUME_POINT)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (folder / "model.safetensors").exists() and not (folder / LOCK).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_disk_that_is_full_in_the_middle_of_a_run_costs_no_earlier_state(tmp_path):
    import resource

    folder, limit = tmp_path / "run", 12 * 2**20  # more than the first point needs, less than the second, with moments
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    one_sentence(start(*SHORT, "--steps", "4", "--save-every", "1", "--out", folder, preexec_fn=full), "cannot write")
    assert read_facts(folder)["step"] == 0 and not [name for name in names(folder) if name.startswith(UNFINISHED)]


def test_ctrl_c_while_libraries_are_imported(tmp_path):
    folder = tmp_path / "run"
    process = start(*SHORT, "--steps", "4", "--out", folder)
    while not (folder / LOCK).exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert said == "\ntrain.py: stopped; there is nothing to go on with yet: give the same command again\n"
    assert names(folder) == [LOCK]  # which the next start takes for its own
