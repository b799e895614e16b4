"""A campaign of mutated files of ours, a thousand by seeds: each is refused in one sentence, or reads as something
sound."""

import copy
import dataclasses
import json
import random

import pytest
from campaign import GOOD_FACTS, facts_file

from flamingo.config import ModelConfig
from flamingo.errors import InputError
from flamingo.files import asset
from flamingo.presets import training_options
from flamingo.run_folder import (
    METRICS,
    RESUME_POINT,
    SUMMARY,
    read_metrics,
    read_summary,
)
from flamingo.settings import FLAT, from_flat, paths, to_flat
from flamingo.training.checkpoint import read_config
from flamingo.training.resume import read_facts

pytestmark = pytest.mark.usefixtures("bounded_memory")


ASSETS = asset("classroom/flamingo")


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
