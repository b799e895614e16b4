"""A thousand files that nobody would write: mutated by a seeded generator, each is read, left out, or refused.

What this file teaches: a campaign tests what somebody thought of; a fuzzer what nobody did. It takes whole files and
flips, cuts, repeats and exchanges parts of them. A finding is a seed: `run_one(FUZZERS["jsonl"], 123, folder)` shows
it again. A new kind of file is one more entry of FUZZERS: its whole bytes, what it may be mutated with, how it is used.
"""

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from test_feature_cache import CountingEncoder, Pictures

from flamingo.data.captions import load_captions
from flamingo.data.feature_cache import FeatureCache
from flamingo.data.pictures import LARGE, open_picture
from flamingo.data.places import Unusable
from flamingo.errors import InputError

pytestmark = pytest.mark.usefixtures("bounded_memory")


@dataclass
class Fuzzer:
    """whole: a good file of each sort. use: called with a mutated one and an empty folder; may raise `expected` and
    nothing else. words: what is put in, beside random bytes. inputs: how many of them a run tries."""

    whole: list[bytes]
    use: Callable[[bytes, Path], None]
    inputs: int
    expected: tuple = (InputError,)
    words: list[bytes] = field(default_factory=lambda: [b"\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80"])


# ---------------------------------------------------------------------------------------------------------- mutations
def flip(rng: random.Random, data: bytes, words: list[bytes]) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def overwrite(rng: random.Random, data: bytes, words: list[bytes]) -> bytes:
    word, at = rng.choice(words), rng.randrange(len(data))
    return data[:at] + word + data[at + len(word) :]


def insert(rng: random.Random, data: bytes, words: list[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(words) + data[at:]


def cut(rng: random.Random, data: bytes, words: list[bytes]) -> bytes:
    return data[: rng.randrange(len(data))]


def drop(rng: random.Random, data: bytes, words: list[bytes]) -> bytes:
    first = rng.randrange(len(data))
    return data[:first] + data[first + rng.randrange(1, 20) :]


def repeat(rng: random.Random, data: bytes, words: list[bytes]) -> bytes:
    first = rng.randrange(len(data))
    last = first + rng.randrange(1, 60)
    return data[:last] + data[first:last] * rng.choice((1, 3)) + data[last:]


MUTATIONS = (flip, overwrite, insert, cut, drop, repeat)


def mutated(fuzzer: Fuzzer, seed: int) -> bytes:
    rng = random.Random(f"fuzz {seed}")
    data = rng.choice(fuzzer.whole)
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(MUTATIONS)(rng, data or b"\0", fuzzer.words)
    return data


def run_one(fuzzer: Fuzzer, seed: int, folder: Path) -> bool:
    """Was it refused? Fails for any other error than those expected."""
    data = mutated(fuzzer, seed)
    try:
        fuzzer.use(data, folder)
    except fuzzer.expected as error:
        assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 700, str(error)
        return True
    return False


# --------------------------------------------------------------------------------------------------- kinds of files
def noise() -> Image.Image:
    return Image.effect_noise((40, 30), 90).convert("RGB")


def encoded(form: str, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    noise().convert(mode).save(file, form, **options)
    return file.getvalue()


PICTURES = [
    encoded("JPEG"), encoded("JPEG", progressive=True), encoded("JPEG", "CMYK"), encoded("PNG"), encoded("PNG", "RGBA"),
    encoded("PNG", "P"), encoded("GIF", "P"), encoded("WEBP"), encoded("BMP"), encoded("TIFF"), encoded("PPM"),
    encoded("TIFF", compression="tiff_lzw"), encoded("TIFF", "F"),
]  # fmt: skip


def open_one(data: bytes, folder: Path) -> None:
    open_picture(data, thumbnail=True)
    picture = open_picture(data)
    assert picture.mode == "RGB" and 0 < picture.width * picture.height <= LARGE


ROWS = [
    {"image": "0.png", "caption": "a dog", "n": 1, "box": [1.5, 2]},
    {"image": "1.png", "caption": "two <image> cats<|endofchunk|>", "n": None, "box": []},
    {"images": ["0.png", "1.png"], "text": "<image>a<|endofchunk|><image>b", "answer": {"answer": "x"}},
    {"image": "0.png", "captions": ["one", "two", None], "label": "cat"},
]
TEXT_WORDS = [
    b"null", b"{}", b"[]", b"[[", b'"', b"\\ud800", b"\n", b",", b"1e999", b"-0", b"true", b"../", b"/etc/passwd",
    b"<image>", b"<|endofchunk|>", b"http://x/", b"\xff", b"\xef\xbb\xbf", b"\r", b"image", b"caption", b"9" * 25,
    b"NaN", b"\0",
]  # fmt: skip


def table(*rows: dict) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def load_table(name: str) -> Callable[[bytes, Path], None]:
    def load(data: bytes, folder: Path) -> None:
        for i in range(2):
            if not (folder / f"{i}.png").exists():
                noise().save(folder / f"{i}.png")
        (folder / name).write_bytes(data)
        for split in load_captions(str(folder if name.startswith("metadata") else folder / name)).values():
            for i in range(len(split)):
                example = split[i]
                numbers = [chunk.picture for text in example.texts for chunk in text if chunk.picture is not None]
                assert numbers and set(numbers) == set(range(len(example.pictures)))

    return load


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row for row in ROWS if "image" in row]), file)
    return file.getvalue()


def cache_file(name: str) -> Callable[[bytes, Path], None]:
    """A mutated file of a finished feature cache: whatever it is, the features that come out are the encoder's."""

    def use(data: bytes, folder: Path) -> None:
        encoder, pictures = CountingEncoder(), Pictures(count=6)
        cache = FeatureCache.open_or_build(folder, pictures, "key", encoder)
        expected = cache[0:6]
        (folder / name).write_bytes(data)
        try:
            assert torch.equal(cache[0:6], expected)  # as a run that had opened it before sees it
        except InputError as error:
            assert "has changed since it was written" in str(error)
        assert torch.equal(FeatureCache.open_or_build(folder, pictures, "key", encoder)[0:6], expected)

    return use


def whole_cache(folder: Path) -> dict[str, bytes]:
    FeatureCache.open_or_build(folder, Pictures(count=6), "key", CountingEncoder())
    return {name: (folder / name).read_bytes() for name in ("features.npy", "rows.crc32", "meta.json")}


FUZZERS = {
    "pictures": Fuzzer(PICTURES, open_one, 450, (Unusable,)),
    "jsonl": Fuzzer([table(*ROWS[:2] * 3), table(ROWS[2], ROWS[2]), table(*ROWS[:1], *ROWS[3:] * 3)],
                    load_table("set.jsonl"), 200, words=TEXT_WORDS),
    "metadata": Fuzzer([table(*ROWS[:2] * 3).replace(b'"image"', b'"file_name"')],
                       load_table("metadata.jsonl"), 80, words=TEXT_WORDS),
    "json": Fuzzer([json.dumps(ROWS[:2] * 2).encode()], load_table("set.json"), 60, words=TEXT_WORDS),
    "csv": Fuzzer([b'image,caption,n\n0.png,a dog,1\n1.png,"two, dogs",2\n0.png,"a ""cat""",\n'],
                  load_table("set.csv"), 120, words=TEXT_WORDS),
    "parquet": Fuzzer([parquet()], load_table("set.parquet"), 40),
}  # fmt: skip
CACHE_FILES = ("features.npy", "rows.crc32", "meta.json")
CACHE_INPUTS = 25  # of each


@pytest.mark.parametrize("kind", FUZZERS)
def test_mutated_files_are_read_left_out_or_refused(kind, tmp_path):
    fuzzer = FUZZERS[kind]
    refused = sum(run_one(fuzzer, seed, tmp_path) for seed in range(fuzzer.inputs))
    assert 0 < refused < fuzzer.inputs  # else the mutations are too wild or too tame to find anything


@pytest.mark.parametrize("name", CACHE_FILES)
def test_a_mutated_feature_cache_never_gives_other_features(name, tmp_path, capsys):
    fuzzer = Fuzzer([whole_cache(tmp_path)[name]], cache_file(name), CACHE_INPUTS)
    assert sum(run_one(fuzzer, seed, tmp_path) for seed in range(CACHE_INPUTS)) == 0  # a cache is never refused


def test_a_thousand_inputs_are_tried():
    assert sum(fuzzer.inputs for fuzzer in FUZZERS.values()) + CACHE_INPUTS * len(CACHE_FILES) >= 1000
