"""A campaign of states that must not be kept nor taken up: numbers that are not finite, halves, what does not fit."""

from pathlib import Path

import pytest
import torch
from campaign import GOOD_FACTS, facts_file, names, options
from conftest import tiny_flamingo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flamingo.classroom.examples import MIXES, ClassroomScenes
from flamingo.config import ModelConfig, TrainingOptions
from flamingo.data.batches import StepSampler
from flamingo.errors import InputError
from flamingo.interop.backbones import _backbone_samples
from flamingo.limits import machine_memory
from flamingo.run_folder import (
    RESUME_POINT,
)
from flamingo.settings import from_flat
from flamingo.training import loop
from flamingo.training.optimizer import make_optimizer
from flamingo.training.resume import ResumePoints

pytestmark = pytest.mark.usefixtures("bounded_memory")


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


def test_drawn_scenes_of_other_shares_are_another_set(points, tmp_path):
    def of(scenes: ClassroomScenes) -> ResumePoints:
        return ResumePoints(tmp_path, points.model, points.optimizer, points.options, ModelConfig(), (scenes,))

    class OtherLayouts(ClassroomScenes):
        LAYOUTS = (4, 1, 1, 1, 1)

    usual = MIXES["cross-attention"]
    of(ClassroomScenes("train")).save(1, "float32")
    assert of(ClassroomScenes("train")).restore() == (1, "float32")
    for changed in (
        ClassroomScenes("train", mix=usual._replace(questions=0.5)),
        ClassroomScenes("train", mix=usual._replace(documents=0.3)),
        ClassroomScenes("train", curriculum=(2000, 0)),
        ClassroomScenes("train", size=90_000),
        OtherLayouts("train"),
    ):
        with pytest.raises(InputError, match="pictures or captions have changed"):
            of(changed).restore()


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
