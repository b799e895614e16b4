"""`python -m benchmarks.architectures --quick`: an architecture is trained, examined and drawn."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import architectures
from flamingo.config import TrainingOptions
from flamingo.errors import InputError
from flamingo.interop.backbones import build_flamingo
from flamingo.presets import model_config


def test_the_comparison_runs_and_goes_on_where_it_was(tmp_path, capsys):
    figure, out = tmp_path / "figure.png", tmp_path / "figures.json"
    order = ["--quick", "--rounds", "1", "--device", "cpu", "--seeds", "1", "--only", "llava"]
    order += ["--json", str(out), "--figure", str(figure), "--out", str(tmp_path / "runs"), "--", "--device", "cpu"]
    architectures.main(order)
    found = json.loads(out.read_text())["architectures"]
    (run,) = found["llava"]["seeds"]
    assert 0 <= run["exact_match"] <= 1 and run["shots"].keys() == {"0", "4"} and run["captions_seen"] > 0
    assert [point["pictures"] for point in found["llava"]["growth"]] == [1, 2]
    said = capsys.readouterr().out
    assert "4 shots" in said and "llava, seed 0" in said and f"{run['peak_memory_bytes']:,}" in said
    with Image.open(figure) as picture:
        assert picture.width > 800
    weights = tmp_path / "runs" / "llava-0" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    architectures.main(order)
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="llava-0 was trained with another lr: take it away, or choose --out"):
        architectures.main([*order, "--lr", "0.5"])


def test_a_picture_makes_a_stream_longer_and_a_text_that_is_too_long_is_left_out():
    device = torch.device("cpu")
    beside, within = (
        architectures.growth(build_flamingo(model_config(TrainingOptions(preset=preset))), [1, 32], 1, device)
        for preset in ("classroom", "classroom-kosmos")
    )
    cache = lambda tokens: architectures.TEXTS * tokens * 192 * 4 * 2 * 4  # noqa: E731 (4 layers, keys and values)
    assert within[0]["kept_bytes"] == cache(3 + 16)
    looks = 2  # cross-attentions; each keeps keys and values of 16 latents
    assert beside[0]["kept_bytes"] == cache(3) + architectures.TEXTS * looks * 16 * 2 * 192 * 4
    assert within[1]["seconds"] is None and beside[1]["seconds"] > 0
