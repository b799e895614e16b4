"""A hundred more hostile data sets, other inputs than those of test_campaign_data.py, which has how they are judged.

What this file teaches: what passes the check before a run must pass in the run, whatever its encoding, its name, its
orientation and its letters; and a picture that is held out is nowhere in training.
"""

import inspect
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin
from test_campaign_data import LARGE, Reads, Refused, check, encoded, good_rows, jsonl, one_sentence, picture

from flamingo.config import TrainingOptions
from flamingo.data.answer_columns import AnswerColumns
from flamingo.data.captions import load_captions
from flamingo.data.places import files_below
from flamingo.errors import InputError
from flamingo.evaluation.test_set import captioned_test_set

pytestmark = pytest.mark.usefixtures("bounded_memory")


# ----------------------------------------------------------------------------------------------------------- pictures
def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return encoded(picture(), "JPEG", exif=exif)


def with_text(length: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * length, zip=True)
    return encoded(picture(), "PNG", pnginfo=info)


def of_numbers(value: float, kind=np.float32) -> bytes:
    return encoded(Image.fromarray(np.full((9, 9), value, kind)), "TIFF")


READABLE = {
    "i16b.tif": lambda: encoded(Image.new("I;16B", (9, 9), 40000), "TIFF"),
    "i32.tif": lambda: encoded(Image.new("I", (9, 9), 70000), "TIFF"),
    "negative.tif": lambda: of_numbers(-5, np.int32),
    "nan.tif": lambda: of_numbers(np.nan),
    "infinite.tif": lambda: of_numbers(np.inf),
    "lab.tif": lambda: encoded(Image.new("LAB", (9, 9)), "TIFF"),
    "ycbcr.tif": lambda: encoded(Image.new("YCbCr", (9, 9)), "TIFF", compression="tiff_lzw"),
    "cmyk.tif": lambda: encoded(Image.new("CMYK", (9, 9)), "TIFF"),
    "pages.tif": lambda: encoded(picture(), "TIFF", save_all=True, append_images=[picture((3, 3))]),
    "one transparent colour.png": lambda: encoded(picture(mode="P"), "PNG", transparency=0),
    "many transparent colours.png": lambda: encoded(picture(mode="P"), "PNG", transparency=bytes(range(256))),
    "a transparent grey.png": lambda: encoded(picture(mode="L"), "PNG", transparency=7),
    "a transparent rgb.png": lambda: encoded(picture(), "PNG", transparency=(1, 2, 3)),
    "moving.png": lambda: encoded(picture(), "PNG", save_all=True, append_images=[picture()]),
    "moving.webp": lambda: encoded(picture(), "WEBP", save_all=True, append_images=[picture()]),
    "1x1.gif": lambda: encoded(Image.new("P", (1, 1)), "GIF"),
    **{f"turned {n}.jpg": lambda n=n: turned(n) for n in (0, 2, 5, 7, 8, 9, 65535)},
    "exif garbage.jpg": lambda: encoded(picture(), "JPEG", exif=b"Exif\0\0garbage"),
    "exif garbage.webp": lambda: encoded(picture(), "WEBP", exif=b"Exif\0\0bad"),
    "exif twenty times.jpg": lambda: encoded(
        picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01\0\0\0\x08\0\0\0" * 20
    ),
    "no colour profile.jpg": lambda: encoded(picture(), "JPEG", icc_profile=b"junk" * 100),
    "long text.png": lambda: with_text(900_000),
    "one bit.bmp": lambda: encoded(picture(mode="1"), "BMP"),
    "16 bits.pgm": lambda: b"P5 4 4 65535\n" + bytes(range(32)),
    "plain.ppm": lambda: b"P3 2 2 255\n1 2 3 4 5 6 7 8 9 10 11 12",
    "200 to 1.png": lambda: encoded(Image.new("L", (400, 2)), "PNG"),
    "inverted cmyk.jpg": lambda: encoded(Image.new("CMYK", (20, 20), (255, 0, 0, 0)), "JPEG"),
    "\u202egnp.exe.png": lambda: encoded(picture(), "PNG"),
    "e\u0301.png": lambda: encoded(picture(), "PNG"),
    "a\u2028b.png": lambda: encoded(picture(), "PNG"),
    "percent%20.png": lambda: encoded(picture(), "PNG"),
    "#hash?.png": lambda: encoded(picture(), "PNG"),
}
UNREADABLE = {
    "a text of 100 MB.png": lambda: with_text(100_000_000),
    "jpeg 2000.jp2": lambda: encoded(picture(), "JPEG2000"),
    "heic.heic": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
    "cut.webp": lambda: encoded(picture((200, 200)), "WEBP")[:-30],
    "cut.gif": lambda: encoded(picture((200, 200), "P"), "GIF")[:-300],
    "cut.tif": lambda: encoded(picture((200, 200)), "TIFF")[:-300],
    "cut.bmp": lambda: encoded(picture((200, 200)), "BMP")[:-300],
    "one byte.jpg": lambda: b"\xff",
    "one zero.png": lambda: bytes(1),
    "50,000 squared.bmp": lambda: (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 1100, 0, 0, 1078, 40, 50000, 50000, 1, 8, 1, 22, 0, 0, 256, 0)
        + bytes(1024) + b"\0\1"
    ),
    "floats.pfm": lambda: b"PF\n2 2\n-1.0\n" + struct.pack("<12f", *[float("nan")] * 12),
    "negative.ppm": lambda: b"P6 -5 5 255\n",
    "no colours.ppm": lambda: b"P6 5 5 0\n" + bytes(75),
    "no frames.gif": lambda: b"GIF89a\x01\0\x01\0\0\0\0;",
    "12 bits.jpg": lambda: encoded(picture((64, 64)), "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
}  # fmt: skip


def one_more(name: str, data: Callable[[], bytes]) -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        (folder / name).write_bytes(data())
        return jsonl(folder, [*good_rows(folder), {"image": name, "caption": "odd"}])

    return build


# -------------------------------------------------------------------------------------------------------------- texts
def captioned(*captions: object) -> Callable[[Path], str]:
    """Pictures with these captions and, up to four, good ones."""

    def build(folder: Path) -> str:
        rows = good_rows(folder, max(4, len(captions)))
        return jsonl(folder, [row | {"caption": c} for row, c in zip(rows, [*captions, "x", "y", "z"], strict=False)])

    return build


MISSING = "caption.s. missing, empty or not text"
TEXTS = {
    "families and flags": (captioned("👩‍👩‍👧‍👦🏳️‍🌈", "🇩🇪"), Reads(4)),
    "right to left": (captioned("\u202eabc", "שלום עולם"), Reads(4)),
    "a zero in a text": (captioned("a\0b"), Reads(4)),
    "a zero alone": (captioned("\0"), Reads(3, 1, MISSING)),
    "100,000 letters": (captioned("a" * 100_000), Reads(4)),
    "50,000 words": (captioned("a " * 50_000), Reads(4)),
    "a tower of accents": (captioned("a" + "\u0301" * 1_000_000), Reads(4)),
    "spaces of several kinds": (captioned(" \u00a0", "\u3000\u2003"), Reads(2, 2, MISSING)),
    "spaces of no width": (captioned("\u200b\u200b"), Reads(3, 1, MISSING)),
    "a byte order mark": (captioned("\ufeff"), Reads(3, 1, MISSING)),
    "a soft hyphen": (captioned("\u00ad"), Reads(3, 1, MISSING)),
    "a mark of direction": (captioned("\u202e\u202c"), Reads(3, 1, MISSING)),
    "special tokens": (captioned("</s>", "<s>", "<pad>", "<unk>"), Reads(4)),
    "tags of another kind": (captioned("<image/> a dog", "<IMAGE> dog", "< image >"), Reads(4)),
    "two tags for a picture": (captioned("<image>a<image>b"), Reads(3, 1, "2 <image> tags for 1 pictures")),
    "a terminal's commands": (captioned("\x1b[2J\x1b]0;x\x07"), Reads(4)),
    "words that are numbers": (captioned("1", "2", "nan", "null"), Reads(4)),
    "lists in lists": (captioned(*[[["a"]]] * 4), Refused("only 0 of 4 examples")),
    "objects": (captioned(*[{"en": "a"}] * 4), Refused("only 0 of 4 examples")),
    "true": (captioned(*[True] * 4), Refused("only 0 of 4 examples")),
    "empty lists": (captioned([], [], ["a"], ["b"]), Reads(2)),
    "nothing in a list": (captioned(*[[None, "a"]] * 4), Reads(4)),
    "10,000 captions of each": (captioned(*[[f"c{i}" for i in range(10_000)]] * 4), Reads(4)),
}


# ---------------------------------------------------------------------------------------------------- files and tables
def test_folders_deeper_than_the_stack(tmp_path):
    depth, limit = 100, sys.getrecursionlimit()
    (tmp_path / "/".join("d" * depth)).mkdir(parents=True)
    picture().save(tmp_path / "/".join("d" * depth) / "0.png")
    try:
        sys.setrecursionlimit(len(inspect.stack()) + depth)
        assert [file.name for file in files_below(tmp_path)] == ["0.png"]
    finally:
        sys.setrecursionlimit(limit)


def of_another_encoding(folder: Path, name: bytes) -> dict:
    for label in (b"cat", name):
        os.mkdir(os.fsencode(folder) + b"/" + label)
        for number in (b"0.png", b"1.png"):
            Path(os.fsdecode(os.fsencode(folder) + b"/" + label + b"/" + number)).write_bytes(encoded(picture(), "PNG"))
    return {"source": str(folder), "answer_columns": AnswerColumns()}


def can_hold(kind: pyarrow.DataType) -> bool:
    """Has this version of datasets such a column?"""
    try:
        return bool(datasets.Features.from_arrow_schema(pyarrow.schema({"column": kind})))
    except ValueError:
        return False


def parquet(**columns) -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        good_rows(folder)
        pyarrow.parquet.write_table(
            pyarrow.table({"image": NAMES, "caption": CAPTIONS} | columns), folder / "a.parquet"
        )
        return str(folder / "a.parquet")

    return build


def described_as(text: str) -> Callable[[Path], str]:
    """A table whose description for `datasets` is `text`."""

    def build(folder: Path) -> str:
        good_rows(folder)
        table = pyarrow.table({"image": NAMES, "caption": CAPTIONS}).replace_schema_metadata({"huggingface": text})
        pyarrow.parquet.write_table(table, folder / "a.parquet")
        return str(folder / "a.parquet")

    return build


def two_of_a_name(folder: Path) -> str:
    arrays = [pyarrow.array(NAMES), pyarrow.array(CAPTIONS), pyarrow.array(CAPTIONS)]
    table = pyarrow.Table.from_arrays(arrays, names=["image", "caption", "caption"])
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return str(folder / "a.parquet")


def tables_of_two_kinds(folder: Path) -> str:
    for name, column in (("train-0.parquet", "caption"), ("train-1.parquet", "text")):
        pyarrow.parquet.write_table(pyarrow.table({"image": NAMES, column: CAPTIONS}), folder / name)
    return str(folder)


def comma_separated(text: str) -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        good_rows(folder)
        (folder / "a.csv").write_bytes(text.encode())
        return str(folder / "a.csv")

    return build


def rows(*given: dict | str) -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        good_rows(folder)
        return jsonl(folder, list(given))

    return build


def no_file(name: str, make: Callable[[Path], None]) -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        good_rows(folder)
        make(folder / name)
        return str(folder)

    return build


NAMES, CAPTIONS = [f"{i}.png" for i in range(4)], ["a", "b", "c", "d"]
VIDEO = json.dumps({"info": {"features": {"image": {"_type": "os.system"}}}})
TABLES = {
    "a class in another encoding": (lambda f: of_another_encoding(f, b"\xff\xfe"), Refused("no text in UTF-8")),
    "a class of a blank": (lambda f: of_another_encoding(f, b" "), Reads(2, 2, MISSING)),
    "metadata is a folder": (no_file("metadata.jsonl", Path.mkdir), Refused("looks like captions")),
    "metadata is a pipe": (no_file("metadata.jsonl", os.mkfifo), Refused("looks like captions")),
    "a table is a pipe": (no_file("train.jsonl", os.mkfifo), Refused("looks like captions")),
    "dictionary": (parquet(caption=pyarrow.array(CAPTIONS).dictionary_encode()), Reads(4)),
    "large strings": (parquet(image=pyarrow.array(NAMES, pyarrow.large_string())), Reads(4)),
    "string views": (parquet(image=pyarrow.array(NAMES, pyarrow.string_view())), Reads(4)),
    "five bytes": (
        parquet(image=pyarrow.array([b"12345"] * 4, pyarrow.binary(5))),
        Refused("holds no pictures" if can_hold(pyarrow.binary(5)) else "does not have a datasets dtype"),
    ),
    "captions in bytes": (parquet(caption=[b"a"] * 4), Refused("only 0 of 4")),
    "times": (parquet(t=pyarrow.array([0] * 4, pyarrow.timestamp("ns"))), Reads(4)),
    "decimals": (parquet(t=pyarrow.array([1] * 4, pyarrow.decimal128(5, 2))), Reads(4)),
    "maps": (parquet(m=pyarrow.array([[("a", 1)]] * 4, pyarrow.map_(pyarrow.string(), pyarrow.int32()))),
             Refused("cannot load the data")),
    "a struct with more": (parquet(image=pyarrow.array([{"bytes": None, "path": n, "w": 1} for n in NAMES])), Reads(4)),
    "pictures of nothing": (parquet(image=pyarrow.nulls(4)), Refused("there is no picture")),
    "no rows": (parquet(image=pyarrow.array([], pyarrow.string()), caption=pyarrow.array([], pyarrow.string())),
                Refused("a.parquet holds no rows")),
    "two columns of a name": (two_of_a_name, Refused("has two columns of the name 'caption'")),
    "tables of other columns": (tables_of_two_kinds, Refused("train-1.parquet has the columns image, text, but")),
    "a description that is cut": (described_as("{not json"), Refused("cannot load the data")),
    "a description of code": (described_as(VIDEO), Refused("cannot load the data .*'os.system' not found")),
    "the line ends of old Macs": (comma_separated("image,caption\r0.png,a\r1.png,x\r2.png,y\r"), Reads(3)),
    "quotes in quotes": (comma_separated('image,caption\r\n0.png,"a ""b"", c"\r\n1.png,x\r\n2.png,y\r\n'), Reads(3)),
    "2,000 columns": (comma_separated(",".join(["image", "caption", *map(str, range(2000))]) + "\n0.png,a\n"),
                      Refused("more than 1000 columns")),
    "a number of 400 digits": (comma_separated(f"image,caption,n\n0.png,a,{'9' * 400}\n1.png,b,1\n"), Reads(2)),
    "a column that is no number": (
        rows('{"image":"0.png","caption":"a","x":NaN}', '{"image":"1.png","caption":"b","x":1e999}'), Reads(2)),
    "bytes in words": (rows(*[{"image": {"bytes": "aGVsbG8=", "path": None}, "caption": "x"}] * 4), Refused("missing")),
    "objects in a list": (
        rows(*[{"images": [{"path": "0.png"}, {"path": n}], "text": "<image>a<image>b"} for n in NAMES]), Reads(4)),
    "image and images": (rows(*[{"image": name, "images": ["1.png"], "text": "a"} for name in NAMES]), Reads(4)),
    "a column named by spaces": (
        rows(*[{"image": n, " caption ": "a"} for n in NAMES]), Refused("looks like captions")),
    "a column named by a zero": (rows(*[{"image": n, "caption\0": "a"} for n in NAMES]), Refused("made a table")),
    "a column without a name": (rows(*[{"image": n, "": "a"} for n in NAMES]), Refused("looks like captions")),
}  # fmt: skip

CASES = (
    {name: (one_more(name, data), Reads(5)) for name, data in READABLE.items()}
    | {name: (one_more(name, data), Reads(4, 1, "(cannot be read as a picture|more than)")) for name, data in
       UNREADABLE.items()}
    | TEXTS | TABLES
)  # fmt: skip


@pytest.mark.parametrize("build, expected", CASES.values(), ids=map(ascii, CASES))
def test_campaign(build, expected, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for split in check(build, (), expected, tmp_path):
        for i in range(len(split)):  # what could be checked can be read
            assert all(p.mode == "RGB" and p.width * p.height <= LARGE for p in split[i].pictures)
    said = capfd.readouterr()
    assert "Failed" not in said.out + said.err  # no library speaks beside the sentence


def test_a_damaged_orientation_is_no_reason_to_leave_a_picture_out_and_a_whole_one_turns_it(tmp_path):
    (tmp_path / "turned.jpg").write_bytes(turned(6))
    jsonl(tmp_path, [*good_rows(tmp_path), {"image": "turned.jpg", "caption": "odd"}])
    sets = load_captions(str(tmp_path / "set.jsonl"))
    sizes = {example.pictures[0].size for split in sets.values() for example in (split[i] for i in range(len(split)))}
    assert sizes == {(24, 18), (18, 24)}


# ------------------------------------------------------------------------------------------ what is held out, and asked
def test_a_picture_that_is_held_out_is_in_no_row_of_the_training_set(tmp_path):
    """A row for each caption, five to a picture: as many sets of photographs come."""
    given = good_rows(tmp_path, 6)
    jsonl(tmp_path, [row | {"caption": f"caption {i} of {row['image']}"} for i in range(5) for row in given])
    sets = load_captions(str(tmp_path / "set.jsonl"))
    shown = [{split.row(i)["image"] for i in range(len(split))} for split in (sets["train"], sets["validation"])]
    assert not shown[0] & shown[1] and len(shown[1]) == 2
    assert (len(sets["train"]), len(sets["validation"])) == (20, 10)
    with_one = [{"image": "0.png", "caption": f"c{i}"} for i in range(8)]
    one = load_captions(jsonl(tmp_path, with_one, "one.jsonl"))  # there is no other to hold out
    assert (len(one["train"]), len(one["validation"])) == (6, 2)


QUESTIONS = {
    "numbers": ({"question": 1, "answer": 2}, {}, (2, 0)),
    "nothing": ({"question": None, "answer": None}, {}, (2, 0)),
    "more questions than answers": ({"questions": ["a", "b"], "answers": ["x"]}, {}, (4, 0)),
    "lists in lists": ({"questions": [["a"]], "answers": [["x"]]}, {}, (0, 0)),
    "objects": ({"question": {"text": "a"}, "answer": {"answer": ["x"]}}, {}, (2, 0)),
    "blanks": ({"question": " ", "answer": " "}, {}, (2, 0)),
    "special tokens": ({"question": "<image>", "answer": "<|endofchunk|>"}, {}, (0, 0)),
    "5,000 words": ({"question": "w " * 5000, "answer": "y"}, {}, (0, 0)),
    "labels of numbers": ({"label": 3}, {}, (None, 0)),
    "labels of nothing": ({"label": None}, {}, (None, 0)),
    "labels of blanks": ({"label": " "}, {}, (None, 0)),
    "labels of lists": ({"label": ["a"]}, {}, (None, 0)),
    "labels of numbers, named": ({"label": 3}, {"label": "label"}, "holds no class names"),
    "a label that is not there": ({"label": "a"}, {"label": "nope"}, "has no column 'nope'"),
    "a question that is not there": ({"question": "a", "answer": "b"}, {"question": "zz"}, "has no column 'zz'"),
    "a question without answers": ({"q": "a"}, {"question": "q"}, "looks like answers"),
    "a caption for a label": ({}, {"label": "caption"}, (None, 6)),
}


@pytest.mark.parametrize("more, named, expected", QUESTIONS.values(), ids=QUESTIONS)
def test_questions_and_labels(more, named, expected, tmp_path):
    source = jsonl(tmp_path, [row | more for row in good_rows(tmp_path, 6)])
    read = lambda: captioned_test_set(TrainingOptions(data=source), "train", 2, 0, AnswerColumns(**named))  # noqa: E731
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected) as caught:
            read()
        one_sentence(str(caught.value))
    else:
        found = read()
        assert (found.left_out, len(found.names)) == expected
        assert all(item.picture.mode == "RGB" for item in found.items)
