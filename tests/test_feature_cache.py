"""Features of the frozen encoder: computed once, trusted only as far as they can be, and never half-written."""

import json
import threading
import time

import numpy as np
import pytest
import torch
from conftest import EOC, IMAGE, TinyEncoder, tiny_flamingo
from filelock import FileLock
from test_data import photograph

from flamingo.data import feature_cache
from flamingo.data.batches import Batch
from flamingo.data.captions import CaptionedPictures, load_captions
from flamingo.data.feature_cache import FeatureCache, cache_key, with_cached_features
from flamingo.errors import InputError
from flamingo.model.vision import VisionEncoder


class CountingEncoder(VisionEncoder):
    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__(TinyEncoder(), "tiny", self.prepare, norm=True)

    @staticmethod
    def prepare(picture):
        return torch.from_numpy(np.array(picture.convert("RGB").resize((8, 8)))).permute(2, 0, 1).float() / 255

    def patch_features(self, pixel_values):
        return self.tower(pixel_values)


class Killed(BaseException):
    """What a kill looks like from within."""


class Pictures(torch.utils.data.Dataset):
    """`count` pictures; asking for number `killed_at` ends the process."""

    def __init__(self, count=50, killed_at=None):
        self.pixels = torch.randn(count, 1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        self.killed_at = killed_at

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        if i == self.killed_at:
            raise Killed
        return self.pixels[i]


@pytest.fixture
def encoder():
    return CountingEncoder()


def build(folder, encoder, pictures=None, key="key"):
    return FeatureCache.open_or_build(folder, pictures or Pictures(), key, encoder)


def test_features_are_those_of_the_encoder_and_are_computed_once(tmp_path, encoder, capsys):
    cache = build(tmp_path, encoder)
    expected = encoder(Pictures().pixels.flatten(0, 1))
    assert cache[0:50].shape == (50, 1, 4, 12) and cache[0:50].dtype == torch.float16
    torch.testing.assert_close(cache[3:5].float().flatten(0, 1), expected[3:5], rtol=1e-3, atol=1e-3)
    assert "MB for 50 pictures" in capsys.readouterr().out
    encoder.tower.calls = 0
    again = build(tmp_path, encoder)
    assert encoder.tower.calls == 1  # one picture, to learn the shape
    assert torch.equal(again[0:50], cache[0:50]) and capsys.readouterr().out == ""


def test_a_killed_build_goes_on_where_it_stopped(tmp_path, encoder, capsys):
    with pytest.raises(Killed):
        build(tmp_path, encoder, Pictures(killed_at=40))
    with open(tmp_path / "features.npy", "ab") as file:
        file.write(b"a row that was being written")
    with open(tmp_path / "rows.crc32", "ab") as file:
        file.write(b"xy")
    encoder.tower.calls = 0
    cache = build(tmp_path, encoder)
    assert encoder.tower.calls == 1 + 18 and "32 are there already" in capsys.readouterr().out
    torch.testing.assert_close(cache[0:50].float()[:, 0], encoder(Pictures().pixels[:, 0]), rtol=1e-3, atol=1e-3)
    assert build(tmp_path, encoder)._fault() is None


def test_a_second_run_waits_until_the_first_has_built(tmp_path, encoder, capsys):
    second, said = threading.Thread(target=build, args=(tmp_path, encoder)), ""
    with FileLock(tmp_path / "lock"):  # the first
        second.start()
        deadline = time.monotonic() + 60
        while "waiting" not in said and time.monotonic() < deadline:
            said += capsys.readouterr().out
        assert "another run is building it; waiting" in said
        assert second.is_alive() and not (tmp_path / "features.npy").exists()
    second.join()
    assert build(tmp_path, encoder).finished() == 50


def test_a_stale_cache_is_built_again_and_said(tmp_path, capsys):
    build(tmp_path, CountingEncoder(0), key=cache_key(CountingEncoder(0), "set"))
    other = CountingEncoder(1)
    cache = build(tmp_path, other, key=cache_key(other, "set"))
    assert "other weights, preprocessing or pictures; building it again" in capsys.readouterr().out
    torch.testing.assert_close(cache[0:2].float()[:, 0], other(Pictures().pixels[:2, 0]), rtol=1e-3, atol=1e-3)
    assert cache_key(other, "set") != cache_key(other, "another set")
    before = cache_key(other, "set")
    other.class_token = True
    assert cache_key(other, "set") != before


@pytest.mark.parametrize("name, damage, reason", [
    ("features.npy", lambda whole: whole[:-100], "wrong size"),
    ("features.npy", lambda whole: b"\0" * 64 + whole[64:], "header"),
    ("features.npy", lambda whole: whole[:-50] + b"\0" * 50, "checksum"),
    ("meta.json", lambda whole: whole[:10], "meta.json is damaged"),
    ("rows.crc32", lambda whole: whole + b"more", "belong together"),
])  # fmt: skip
def test_a_damaged_cache_is_built_again_and_said(tmp_path, encoder, capsys, name, damage, reason):
    whole = build(tmp_path, encoder)[0:50]
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    capsys.readouterr()
    assert torch.equal(build(tmp_path, encoder)[0:50], whole)
    assert reason in (said := capsys.readouterr().out) and "building it again" in said
    assert build(tmp_path, encoder)._fault() is None


@pytest.mark.parametrize("row", [1, 23, 48])  # not only rows that a sample would meet
def test_one_byte_or_a_zeroed_row_is_noticed_at_the_start_and_when_it_is_read(tmp_path, encoder, row, capsys):
    cache = build(tmp_path, encoder)
    whole, file = cache[0:50], bytearray(cache.features.read_bytes())
    begin = len(cache.header) + row * cache.row_bytes
    for damaged in (bytes([file[begin + 5] ^ 16]), bytes(cache.row_bytes)):
        bad = bytearray(file)
        start = begin + 5 if len(damaged) == 1 else begin
        bad[start : start + len(damaged)] = damaged
        cache.features.write_bytes(bad)
        assert torch.equal(cache[row - 1 : row], whole[row - 1 : row])
        with pytest.raises(InputError, match=f"picture {row} of the feature cache .* has changed since it was written"):
            cache[row - 1 : row + 1]
        assert torch.equal(build(tmp_path, encoder)[0:50], whole)
        assert f"row {row} does not match its checksum; building it again" in capsys.readouterr().out


def test_too_small_and_full_disks_are_said_and_leave_nothing_that_looks_whole(tmp_path, encoder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache.shutil, "disk_usage", lambda _: type("", (), {"free": 10}))
        with pytest.raises(InputError, match="--cache off"):
            build(tmp_path / "small", encoder)

    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "_to_disk", full)
        with pytest.raises(InputError, match=r"No space left on device.*--cache off"):
            build(tmp_path / "full", encoder)
    assert build(tmp_path / "full", encoder)[0:50].isfinite().all()
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match="cannot use the feature cache"):
        build(tmp_path / "file" / "below", encoder)


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "pictures"
    where.mkdir()
    rows = []
    for i in range(8):
        photograph(where / f"{i}.jpg", i)
        rows.append({"file_name": f"{i}.jpg", "captions": [f"picture {i}", f"the number {i}"]})
    (where / "5.jpg").write_bytes(b"broken")
    (where / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return where


def test_both_parts_of_a_set_share_a_cache_and_every_example_gets_its_own(folder, tmp_path, encoder):
    sets = load_captions(str(folder))
    for part in ("train", "validation"):
        cached = with_cached_features(sets[part], encoder, str(tmp_path / "cache"))
        for i in range(len(sets[part])):
            expected = encoder(torch.stack([encoder.prepare(picture) for picture in sets[part][i].pictures]))
            torch.testing.assert_close(cached[i].features.float()[:, 0], expected, rtol=1e-3, atol=1e-3)
            assert cached[i].texts == sets[part][i].texts and cached.length(i) == sets[part].length(i)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    before = sets["train"].fingerprint
    photograph(folder / "2.jpg", 77)
    assert load_captions(str(folder))["train"].fingerprint != before


def test_off_means_off(folder, encoder, tmp_path):
    examples = load_captions(str(folder))["train"]
    assert isinstance(with_cached_features(examples, encoder, "off"), CaptionedPictures)


def test_the_loss_from_float16_features_is_that_from_pixels():
    model = tiny_flamingo()
    pixels = torch.randn(2, 1, 3, 8, 8)
    ids = torch.tensor([[2, IMAGE, 11, 12, EOC], [2, IMAGE, 13, 14, EOC], [2, IMAGE, 15, 16, EOC]])
    labels = ids.masked_fill(ids < 10, -100).masked_fill(ids == IMAGE, -100)
    texts, index = (ids, torch.ones_like(ids), labels), torch.tensor([[0], [0], [1]])
    from_pixels = Batch(*texts, image_index=index, pixel_values=pixels)
    cached = Batch(*texts, image_index=index, features=model.encode_images(pixels).half())
    a, b = (model(**batch.to("cpu").inputs()).loss.item() for batch in (from_pixels, cached))
    assert a == pytest.approx(b, rel=1e-3) and a != b
    assert len(cached.first(2).features) == 1 and len(from_pixels.first(3).pixel_values) == 2
    assert model(**cached.inputs(), blind=True).loss.isfinite()
