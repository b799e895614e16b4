"""The benchmarks run, compare two models that compute the same, and say what is missing. (Tiny shapes: the figures mean
nothing here.)"""

import importlib.util
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from benchmarks import bundled, classroom, common, decode, growth, memory, pieces, precision, scale, shapes, train
from flamingo.classroom import scenes
from flamingo.errors import InputError
from flamingo.files import asset

needs_peer = pytest.mark.skipif(
    importlib.util.find_spec("open_flamingo") is None or importlib.util.find_spec("einops_exts") is None,
    reason="the peer is not installed: pip install --no-deps open-flamingo==2.0.1 einops-exts",
)
RATIOS = {
    "train": {"train_cached", "train_pixels", "train_pixels_single"},
    "decode": {"decode_1", "decode_8", "decode_beam3"},
    "growth": {"images_per_text_1", "captions_per_image_2", "text_length_8", "latents_16"},
}


@needs_peer
@pytest.mark.parametrize("benchmark", [train, decode, growth], ids=RATIOS)
def test_a_benchmark_compares_equals_and_writes_its_figures(benchmark, tmp_path, capsys):
    name = benchmark.__name__.rsplit(".", 1)[-1]
    figure, out = tmp_path / "figure.png", tmp_path / "figures.json"
    benchmark.main(["--quick", "--rounds", "1", "--device", "cpu", "--json", str(out), "--figure", str(figure)])
    result = json.loads(out.read_text())
    assert result["ratios"].keys() >= RATIOS[name] and result["quick"]
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in result["ratios"].values())
    assert result["losses"]["difference"] < 1e-4
    if name == "train":
        assert result["losses"]["ours_cached"] == pytest.approx(result["losses"]["peer"], rel=1e-2)
        spread = result["captions_per_second"]["train_cached"]
        assert spread["low"] <= spread["median"] <= spread["high"] and len(spread["raw"]) == 1
    if name == "decode":
        assert result["same_greedy_tokens"] == 1
    with Image.open(figure) as picture:
        assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    assert "OpenFlamingo" in capsys.readouterr().out


@needs_peer
def test_memory_of_one_side(capsys):
    memory.main(["--quick", "--device", "cpu", "--side", "peer", "--texts", "5"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["model"] > 0 and found["step"] >= 0


def test_scale_holds_what_processes_send_and_keep_against_its_model(tmp_path, capsys):
    out = tmp_path / "figures.json"
    figure = tmp_path / "figure.png"
    scale.main(["--quick", "--rounds", "2", "--device", "cpu", "--json", str(out), "--figure", str(figure)])
    result = json.loads(out.read_text())
    assert [row[:2] for row in result["measured"]][:2] == [[1, "copied"], [2, "copied"]]
    for _, how, captions, _, _, kept, by_the_model in result["measured"]:
        assert captions > 0 and kept == pytest.approx(by_the_model, rel=0.02), how
    split = {(row["name"], row["gpus"]): row["memory"] for row in result["predicted"] if row["shard"]}
    assert all(row["memory"] > split[row["name"], row["gpus"]] for row in result["predicted"] if not row["shard"])
    assert figure.stat().st_size > 0 and "days for 1e8 captions" in capsys.readouterr().out


def test_memory_is_the_peers_over_ours_each_in_the_dtype_that_needs_less(monkeypatch, tmp_path):
    def measured(order, **_):
        side, dtype = (order[order.index(name) + 1] for name in ("--side", "--dtype"))
        step = {"peer": 600, "memory": 400, "memory_pixels": 300}[side] + 100 * (dtype == "bfloat16")
        step -= 300 * (dtype == "bfloat16" and side == "memory")
        found = json.dumps({"model": 300, "step": step})
        return subprocess.CompletedProcess(order, 0, stdout=f"said\n{found}\n")

    # In this module only: other libraries run programs too, whenever they like.
    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=measured))
    memory.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "memory.json")])
    result = json.loads((tmp_path / "memory.json").read_text())
    assert result["chosen"] == {"peer": "float32", "memory": "bfloat16", "memory_pixels": "float32"}
    assert result["ratios"] == {"memory": 3.0, "memory_pixels": 2.0}
    assert result["ratios_model_included"] == {"memory": 1.8, "memory_pixels": 1.5}


def test_both_dtypes_learn_the_same(tmp_path, capsys):
    precision.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "precision.json")])
    result = json.loads((tmp_path / "precision.json").read_text())
    exact, fast = result["losses"]["float32"], result["losses"]["bfloat16"]
    assert exact[0] == pytest.approx(fast[0], rel=1e-2) and exact != fast and len(exact) == 24
    assert sum(exact[-8:]) < 0.995 * sum(exact[:8])  # something is learned
    assert result["mean_difference"] <= result["largest_difference"] < 0.05
    assert "within 1%" in capsys.readouterr().out


def test_the_pieces_compute_the_same_and_are_compared(tmp_path):
    figure, out = tmp_path / "figure.png", tmp_path / "pieces.json"
    pieces.main(["--quick", "--rounds", "1", "--device", "cpu", "--json", str(out), "--figure", str(figure)])
    for case in json.loads(out.read_text())["cases"].values():
        assert case["ratios"].keys() == pieces.VARIANTS.keys() and case["ratios"]["plain"] == 1
        assert case["installed"]["all"] == ["grouped", "chunked", "packed", "few_at_once"]
        assert max(case["losses"].values()) - min(case["losses"].values()) < 1e-4
    assert figure.stat().st_size


def test_the_parts_of_a_classroom_step_add_up(tmp_path):
    figure, out = tmp_path / "figure.png", tmp_path / "classroom.json"
    classroom.main(["--quick", "--device", "cpu", "--json", str(out), "--figure", str(figure)])
    result = json.loads(out.read_text())
    assert sum(result["share"].values()) == pytest.approx(1) and figure.stat().st_size
    assert all(len(spread["raw"]) == 3 and spread["low"] > 0 for spread in result["seconds"].values())


def test_a_missing_peer_is_said_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_flamingo.src.flamingo", None)
    with pytest.raises(SystemExit) as exit:
        common.command("train", train.main, ["--quick", "--device", "cpu"])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install --no-deps open-flamingo==2.0.1 einops-exts" in said


def test_mistakes_in_options(tmp_path):
    with pytest.raises(InputError, match="--rounds must be at least 1"):
        train.main(["--quick", "--rounds", "-3"])
    with pytest.raises(InputError, match="there is no folder"):
        train.main(["--quick", "--json", str(tmp_path / "nowhere" / "x.json")])


def test_captions_are_as_long_as_people_write_them():
    texts = [text for texts in shapes.make_texts(shapes.FULL, 400, 5, 16) for text in texts]
    lengths = [len(text.ids) - 3 for text in texts]
    assert 12.5 < sum(lengths) / len(lengths) < 13.5 and max(lengths) <= 32 and min(lengths) >= 4


def test_both_sides_read_the_same_texts_and_ours_in_batches_of_equal_length():
    examples = shapes.make_texts(shapes.FULL, 192, 5, 16)
    every = {text for texts in examples for text in texts}
    spread = {}
    for name, batches in (("ours", train.own_batches(examples)(40)), ("peer", train.their_batches(examples)(40))):
        assert all(text in every for batch in batches for text in batch) and {len(batch) for batch in batches} == {40}
        spread[name] = sum(max(len(t.ids) for t in b) - min(len(t.ids) for t in b) for b in batches) / len(batches)
    assert spread["ours"] < spread["peer"]
    assert [len(b) for b in train.evenly(train.own_batches(examples)(40), 4)] == [40] * 4


def test_a_score_of_nothing_is_drawn_without_a_factor(tmp_path):
    common.draw_bars(tmp_path / "bars.png", [("cider_d", 0.1, 0.0), ("bleu_4", 0.0, 0.0)], "score", "both sides")
    with Image.open(tmp_path / "bars.png") as drawn:
        assert drawn.width > 400


def test_photographs_of_packages_are_captioned_and_asked_about(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="pip install scikit-image"):
        bundled.open_bundled("no_such_package", "data/cat.png")
    scene = scenes.make_scene(0, "test", 0)
    monkeypatch.setattr(bundled, "open_bundled", lambda *name: scene.draw())
    figure = tmp_path / "strip.png"
    bundled.main([str(asset("classroom/flamingo")), "--beams", "2", "--figure", str(figure)])
    out = capsys.readouterr().out
    assert out.count("What ") == len(bundled.PICTURES) and any(thing in out for thing in scene.names)
    assert Image.open(figure).width > 600
