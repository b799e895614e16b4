"""Two hundred hostile data sets: each ends in one sentence, or in a stated number of rows left out, and is not changed.

What this file teaches: what people, programs and enemies put into a data set. A case is a function that builds it in a
folder and returns what `load_captions` is called with, beside what must come of it: `Refused` or `Reads`.
"""

import csv
import io
import json
import os
import re
import socket
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from flamingo.data.captions import CaptionedPictures, load_captions
from flamingo.data.pictures import LARGE
from flamingo.errors import InputError

pytestmark = pytest.mark.usefixtures("bounded_memory")

GOOD = 4  # whole pictures in every set
OUTSIDE = "outside.png"  # a picture beside the folder of the set


@dataclass
class Refused:
    """The set is refused; the sentence matches `why`."""

    why: str


@dataclass
class Reads:
    """So many examples; `left_out` lines of skipped.txt, the first of which matches `why`."""

    examples: int
    left_out: int = 0
    why: str = ""


CASES: list = []


def case(name: str, expected: Refused | Reads, *arguments):
    """Add the decorated builder to the campaign, called with the folder and these arguments."""

    def add(build: Callable) -> Callable:
        CASES.append(pytest.param(build, arguments, expected, id=f"{build.__name__}: {name}"))
        return build

    return add


# ------------------------------------------------------------------------------------------------------ what they do
def picture(size=(24, 18), mode: str = "RGB") -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB").convert(mode)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int, *, colour: int = 6, rows: int | None = None) -> bytes:
    """A PNG of any size on the paper, with as many rows of zeros as asked for; deflated zeros take no room."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    size = 1 + width * {6: 4, 2: 3, 0: 1}[colour]
    body = zlib.compressobj(9)
    data = b"".join([*(body.compress(bytes(size)) for _ in range(height if rows is None else rows)), body.flush()])
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def good_rows(folder: Path, count: int = GOOD) -> list[dict]:
    for i in range(count):
        picture().save(folder / f"{i}.png")
    return [{"image": f"{i}.png", "caption": f"the picture {i}"} for i in range(count)]


def jsonl(folder: Path, rows: list, name: str = "set.jsonl") -> str:
    (folder / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(folder / name)


def beside_good_ones(folder: Path, name: str) -> str:
    return jsonl(folder, [*good_rows(folder), {"image": name, "caption": "the hostile one"}])


def one_sentence(message: str) -> None:
    assert "\n" not in message and len(message) < 700 and "Traceback" not in message, message
    assert message.isprintable(), message
    assert "An error occurred while generating" not in message


def state_of(folder: Path) -> dict:
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) and status.st_size < 10**7 else None
        found[path] = (stat.S_IFMT(status.st_mode), status.st_size, status.st_mtime_ns, content)
    return found


def peak_memory(work: Callable) -> int:
    """How far the process grew while it did `work`, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    read = lambda what: int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # noqa: E731
    before = read("VmRSS")
    work()
    return read("VmHWM") - before


# --------------------------------------------------------------------------------------- files that are no pictures
NOT_READ = r"^bad\.\w+: cannot be read as a picture"
whole_jpeg, whole_png = encoded(picture((64, 48)), "JPEG"), encoded(picture((64, 48)), "PNG")


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


@case("empty", Reads(GOOD, 1, NOT_READ), "bad.jpg", b"")
@case("text", Reads(GOOD, 1, NOT_READ), "bad.jpg", b"I am no picture")
@case("html", Reads(GOOD, 1, NOT_READ), "bad.jpg", b"<html><body>404 not found</body></html>")
@case("svg", Reads(GOOD, 1, NOT_READ), "bad.svg", b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>')
@case("pickle", Reads(GOOD, 1, NOT_READ), "bad.png", b"\x80\x04cos\nsystem\n(S'touch gotcha'\ntR.")
@case(
    "EPS called jpg",
    Reads(GOOD, 1, NOT_READ),
    "bad.jpg",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(gotcha) (w) file closefile\n%%EOF\n",
)
@case("PDF called jpg", Reads(GOOD, 1, NOT_READ), "bad.jpg", encoded(picture(), "PDF"))
@case("ICO called png", Reads(GOOD, 1, NOT_READ), "bad.png", encoded(picture((32, 32)), "ICO"))
@case("TGA", Reads(GOOD, 1, NOT_READ), "bad.tga", encoded(picture(), "TGA"))
@case("PCX", Reads(GOOD, 1, NOT_READ), "bad.pcx", encoded(picture(), "PCX"))
@case("SGI", Reads(GOOD, 1, NOT_READ), "bad.sgi", encoded(picture(), "SGI"))
@case("DDS", Reads(GOOD, 1, NOT_READ), "bad.dds", encoded(picture(), "DDS"))
@case("IM", Reads(GOOD, 1, NOT_READ), "bad.im", encoded(picture(), "IM"))
@case("XBM", Reads(GOOD, 1, NOT_READ), "bad.xbm", encoded(picture(mode="1"), "XBM"))
@case("MSP", Reads(GOOD, 1, NOT_READ), "bad.msp", encoded(picture(mode="1"), "MSP"))
@case("a jpeg's first two bytes", Reads(GOOD, 1, NOT_READ), "bad.jpg", b"\xff\xd8")
@case("a jpeg cut in its header", Reads(GOOD, 1, NOT_READ), "bad.jpg", whole_jpeg[:300])
@case("a jpeg cut in its pixels", Reads(GOOD, 1, NOT_READ), "bad.jpg", whole_jpeg[: len(whole_jpeg) * 2 // 3])
@case("a png's signature", Reads(GOOD, 1, NOT_READ), "bad.png", whole_png[:8])
@case("a png cut in its pixels", Reads(GOOD, 1, NOT_READ), "bad.png", whole_png[: len(whole_png) // 2])
@case("a png whose header was changed", Reads(GOOD, 1, NOT_READ), "bad.png", flipped(whole_png, 19))
@case("a png whose pixels were changed", Reads(GOOD, 1, NOT_READ), "bad.png", flipped(whole_png, 60))
@case("a png without width", Reads(GOOD, 1, r"^bad.png: (cannot|is 0 x)"), "bad.png", png(0, 9))
@case("a png without height", Reads(GOOD, 1, r"^bad.png: (cannot|is 9 x 0)"), "bad.png", png(9, 0))
@case("a gif's header", Reads(GOOD, 1, NOT_READ), "bad.gif", b"GIF89a\x10\x00\x10\x00\x00\x00\x00")
@case("a webp's header", Reads(GOOD, 1, NOT_READ), "bad.webp", encoded(picture(), "WEBP")[:40])
@case("a tiff's header", Reads(GOOD, 1, NOT_READ), "bad.tif", encoded(picture(), "TIFF")[:30])
@case("a bmp's header", Reads(GOOD, 1, NOT_READ), "bad.bmp", encoded(picture(), "BMP")[:60])
@case("a ppm of letters", Reads(GOOD, 1, NOT_READ), "bad.ppm", b"P6 a b c d")
@case("zeros", Reads(GOOD, 1, NOT_READ), "bad.jpg", bytes(5000))
def a_file(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    return beside_good_ones(folder, name)


# ------------------------------------------------------------------------------------------------------------- bombs
TOO_LARGE, TOO_THIN = r"^bad\.\w+: (is|has more than) .*(limit|pixels)$", r"^bad\.\w+: is \d+ x \d+ pixels: too thin"
BOMBS: list = []


def bomb(name: str, why: str, file: str, data: Callable[[], bytes]) -> None:
    def build(folder: Path) -> str:
        (folder / file).write_bytes(data())
        return beside_good_ones(folder, file)

    build.__name__ = "a_bomb"
    BOMBS.append(pytest.param(build, (), Reads(GOOD, 1, why), id=f"a_bomb: {name}"))


bomb("a png of 13,370 squared", TOO_LARGE, "bad.png", lambda: png(13370, 13370))
bomb("a png of 9,000 squared", TOO_LARGE, "bad.png", lambda: png(9000, 9000))
bomb("a png of 2^31 - 1 squared", r"^bad.png: ", "bad.png", lambda: png(2**31 - 1, 2**31 - 1, rows=0))
bomb("a png of one bit a pixel", TOO_LARGE, "bad.png", lambda: encoded(Image.new("1", (12000, 12000)), "PNG"))
bomb("a gif of 65,535 squared", TOO_LARGE, "bad.gif", lambda: b"GIF89a" + b"\xff" * 4 + bytes(3)
     + b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;")  # fmt: skip
bomb("a bmp of 100,000 squared", TOO_LARGE, "bad.bmp", lambda: flipped_size_of_bmp(100_000))
bomb("a ppm of 100,000 squared", TOO_LARGE, "bad.ppm", lambda: b"P6 100000 100000 255\n" + bytes(99))
bomb("a tiff of 20,000 squared", TOO_LARGE, "bad.tif", lambda: encoded(Image.new("1", (20000, 13000)), "TIFF",
     compression="group4"))  # fmt: skip
bomb("a picture of one row", TOO_THIN, "bad.png", lambda: png(60000, 1))
bomb("a picture of one column", TOO_THIN, "bad.png", lambda: png(1, 60000))
bomb("a thin jpeg", TOO_THIN, "bad.jpg", lambda: encoded(Image.new("L", (9000, 3)), "JPEG"))


def flipped_size_of_bmp(side: int) -> bytes:
    data = bytearray(encoded(picture(), "BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    return bytes(data)


# -------------------------------------------------------------------------------------- pictures that only look hostile
@case("1 x 1", Reads(5), "odd.png", lambda: encoded(picture((1, 1)), "PNG"))
@case("7 pixels wide", Reads(5), "odd.jpg", lambda: encoded(picture((7, 300)), "JPEG"))
@case("300 x 7", Reads(5), "odd.jpg", lambda: encoded(picture((300, 7)), "JPEG"))
@case("3 x 3 jpeg", Reads(5), "odd.jpg", lambda: encoded(picture((3, 3)), "JPEG"))
@case("one bit", Reads(5), "odd.png", lambda: encoded(picture(mode="1"), "PNG"))
@case("palette", Reads(5), "odd.png", lambda: encoded(picture(mode="P"), "PNG"))
@case("grey with alpha", Reads(5), "odd.png", lambda: encoded(picture(mode="LA"), "PNG"))
@case("all transparent", Reads(5), "odd.png", lambda: encoded(Image.new("RGBA", (9, 9)), "PNG"))
@case("CMYK", Reads(5), "odd.jpg", lambda: encoded(picture(mode="CMYK"), "JPEG"))
@case("16 bits", Reads(5), "odd.png", lambda: encoded(Image.new("I;16", (9, 9), 999), "PNG"))
@case("floating point", Reads(5), "odd.tif", lambda: encoded(picture(mode="F"), "TIFF"))
@case("progressive", Reads(5), "odd.jpg", lambda: encoded(picture((200, 90)), "JPEG", progressive=True))
@case(
    "turned",
    Reads(5),
    "odd.jpg",
    lambda: encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
)
@case(
    "an animation",
    Reads(5),
    "odd.gif",
    lambda: encoded(picture(mode="P"), "GIF", save_all=True, append_images=[picture(mode="P")] * 3),
)
@case("lossless webp", Reads(5), "odd.webp", lambda: encoded(picture(), "WEBP", lossless=True))
@case("bmp", Reads(5), "odd.bmp", lambda: encoded(picture(), "BMP"))
@case("tiff, lzw", Reads(5), "odd.tiff", lambda: encoded(picture(), "TIFF", compression="tiff_lzw"))
@case("ppm", Reads(5), "odd.ppm", lambda: encoded(picture(), "PPM"))
@case(
    "two frames in a jpeg (MPO)",
    Reads(5),
    "odd.jpg",
    lambda: encoded(picture(), "MPO", save_all=True, append_images=[picture()]),
)
@case("a png called jpg", Reads(5), "odd.jpg", lambda: encoded(picture(), "PNG"))
@case("bytes after the end", Reads(5), "odd.jpg", lambda: whole_jpeg + b"PK\x03\x04 and more")
@case("no suffix", Reads(5), "odd", lambda: whole_jpeg)
@case("5000 squared, grey", Reads(5), "odd.jpg", lambda: encoded(Image.new("L", (5000, 5000)), "JPEG"))
@case("a jpeg of 108 million", Reads(5), "odd.jpg", lambda: encoded(Image.new("L", (12000, 9000)), "JPEG"))
@case("5000 squared, palette", Reads(5), "odd.png", lambda: encoded(Image.new("P", (5000, 5000)), "PNG"))
@case(
    "5000 squared, one bit, turned",
    Reads(5),
    "odd.tif",
    lambda: encoded(Image.new("1", (5000, 5000)), "TIFF", compression="group4", tiffinfo={274: 6}),
)
@case("in other letters", Reads(5), "Straße 猫 🐈.png", lambda: whole_png)
@case("with spaces", Reads(5), " a  b .png", lambda: whole_png)
@case("like an option", Reads(5), "--out=x.png", lambda: whole_png)
@case("like a pattern", Reads(5), "a[1]*?.png", lambda: whole_png)
@case("like a chain of file systems", Reads(5), "zip::x.png", lambda: whole_png)
@case("with a line break", Reads(5), "a\nb.png", lambda: whole_png)
@case("like a split", Reads(5), "train.png", lambda: whole_png)
@case("train.jpg", Reads(5), "train.jpg", lambda: whole_jpeg)
@case("test.jpg", Reads(5), "test.jpg", lambda: whole_jpeg)
@case("crash test dummy.jpg", Reads(5), "crash test dummy.jpg", lambda: whole_jpeg)
@case("validation-00000-of-00001.jpg", Reads(5), "validation-00000-of-00001.jpg", lambda: whole_jpeg)
def an_odd_picture_in_a_folder(folder: Path, name: str, data: Callable[[], bytes]) -> str:
    (folder / name).write_bytes(data())
    rows = [*good_rows(folder), {"image": name, "caption": "the odd one"}]
    jsonl(folder, [{"file_name": row["image"], "caption": row["caption"]} for row in rows], "metadata.jsonl")
    return str(folder)


# ----------------------------------------------------------------------------------------- what is no file, or far away
def fifo(path: Path) -> None:
    os.mkfifo(path)


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is at most 108 bytes
        server.bind(path.name)
        os.chdir(here)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(100 * 10**9)


@case("a pipe", Reads(GOOD, 1, "^bad.png: is no regular file"), fifo)
@case("a socket", Reads(GOOD, 1, "^bad.png: is no regular file"), socket_file)
@case("a folder", Reads(GOOD, 1, "^bad.png: is no regular file"), Path.mkdir)
@case("a link to nothing", Reads(GOOD, 1, "^bad.png: is missing"), lambda path: path.symlink_to("nothing.png"))
@case("a link to itself", Reads(GOOD, 1, "^bad.png: (cannot be|is missing)"), lambda path: path.symlink_to(path.name))
@case("a link to a good picture", Reads(GOOD + 1), lambda path: path.symlink_to("0.png"))
@case("100 GB", Reads(GOOD, 1, "^bad.png: is a file of 100000 MB"), sparse)
@case("nothing", Reads(GOOD, 1, "^bad.png: is missing"), lambda path: None)
@case(
    "a link to a device", Refused("outside of its folder.*--allow-outside"), lambda path: path.symlink_to("/dev/zero")
)
@case(
    "a link outside",
    Refused("outside of its folder.*--allow-outside"),
    lambda path: path.symlink_to(path.parent.parent / OUTSIDE),
)
@case(
    "a folder that is a link",
    Refused("outside of its folder"),
    lambda path: path.symlink_to(path.parent.parent, target_is_directory=True),
)
def no_regular_file(folder: Path, make: Callable[[Path], None]) -> str:
    make(folder / "bad.png")
    return beside_good_ones(folder, "bad.png")


@case("a device", Reads(GOOD, 1, "is no regular file"), "/dev/zero")
@case("a terminal", Reads(GOOD, 1, "(is no regular file|is missing|cannot be read)"), "/dev/tty")
@case("memory", Reads(GOOD, 1, "(cannot be read|is missing)"), "/proc/self/mem")
@case("a picture outside", Reads(GOOD + 1), f"../{OUTSIDE}")
def what_is_outside_and_allowed(folder: Path, name: str) -> dict:
    return {"source": beside_good_ones(folder, name), "allow_outside": True}


@case("empty", Reads(GOOD, 1, "^row 5: there is no picture"), "")
@case("of 400 letters", Reads(GOOD, 1, "cannot be (read|found)"), "x" * 400)
@case("with a NUL", Reads(GOOD, 1, "cannot be found"), "a\0b.png")
@case("with a terminal's commands", Reads(GOOD, 1, r"\\x1b.*is missing"), "\x1b[2Jx.png")
@case("a dot", Reads(GOOD, 1, "is no regular file"), ".")
@case("backslashes", Reads(GOOD, 1, "is missing"), "..\\..\\secret.png")
@case("a home", Reads(GOOD, 1, "is missing"), "~/secret.png")
@case("a variable", Reads(GOOD, 1, "is missing"), "$HOME/secret.png")
@case("base64", Reads(GOOD, 1, "(is missing|cannot be read)"), "data:image/png;base64,iVBORw0KGgo=")
@case("the folder above", Refused("outside of its folder"), "..")
@case("the root", Refused("outside of its folder"), "/")
def a_name(folder: Path, name: str) -> str:
    return beside_good_ones(folder, name)


# -------------------------------------------------------------------------------------- one rule, whatever the format
def as_csv(folder: Path, rows: list[dict]) -> str:
    with open(folder / "set.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "set.csv")


def as_parquet(folder: Path, rows: list[dict]) -> str:
    datasets.Dataset.from_list(rows).to_parquet(folder / "set.parquet")
    return str(folder / "set.parquet")


def as_parquet_of_pictures(folder: Path, rows: list[dict]) -> str:
    rows = [{"image": {"bytes": None, "path": row["image"]}, "caption": row["caption"]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "set.parquet")
    return str(folder / "set.parquet")


def as_metadata(folder: Path, rows: list[dict]) -> str:
    jsonl(folder, [{"file_name": row["image"], "caption": row["caption"]} for row in rows], "metadata.jsonl")
    return str(folder)


def as_documents(folder: Path, rows: list[dict]) -> str:
    return jsonl(folder, [{"images": ["0.png", row["image"]], "text": "<image>a<image>b"} for row in rows])


FORMS = (jsonl, as_csv, as_parquet, as_parquet_of_pictures, as_metadata, as_documents)
FETCHED = "nothing is fetched from a network"
FAR = {
    "above": (f"../{OUTSIDE}", "outside of its folder .* --allow-outside"),
    "above, in the middle": (f"sub/../../{OUTSIDE}", "outside of its folder"),
    "absolute": ("/etc/passwd", "outside of its folder"),
    "http": ("http://localhost:1/x.png", FETCHED),
    "a file's URL": ("file:///etc/passwd", FETCHED),
    "an archive's URL": ("zip://x.png::https://localhost:1/a.zip", FETCHED),
}
for form in FORMS:
    for kind, (far, why) in FAR.items():

        @case(f"{kind}, {form.__name__}", Refused(why), form, far)
        def far_away(folder: Path, form: Callable, name: str) -> str:
            return form(folder, [*good_rows(folder), {"image": name, "caption": "far away"}])


for form in FORMS:

    @case(form.__name__, Reads(GOOD), form)
    def near(folder: Path, form: Callable) -> str:
        return form(folder, good_rows(folder))


# ------------------------------------------------------------------------------------------------------------- jsonl
@case("lines of null", Refused(r"set.jsonl, line 1 holds nothing: a row is an object"), ["null"] * 50)
@case("one null", Refused("line 3 holds nothing"), [{"image": "0.png", "caption": "x"}] * 2 + ["null"])
@case("numbers", Refused("line 1 holds a number"), ["1", "2"])
@case("lists", Refused("line 1 holds a list"), ["[1]", "[2]"])
@case("texts", Refused("line 1 holds text"), ['"a"', '"b"'])
@case("no json", Refused(r"line 1 is not JSON \(Expecting value at character 1\)"), ["hello"])
@case("a comma too many", Refused("line 2 is not JSON"), [{"image": "0.png", "caption": "x"}, '{"image": "1.png",}'])
@case("cut", Refused("line 1 is not JSON"), ['{"image": "0.png", "capt'])
@case("two objects in a line", Refused("line 1 is not JSON"), ['{"a": 1} {"b": 2}'])
@case("single quotes", Refused("line 1 is not JSON"), ["{'image': '0.png'}"])
@case("only blank lines", Refused("holds no rows"), ["", "  ", ""])
@case("nothing", Refused("holds no rows"), [])
@case(
    "blank lines between", Reads(2), [{"image": "0.png", "caption": "x"}, "", "  ", {"image": "1.png", "caption": "y"}]
)
@case("deep lists", Refused("line 1: .*within each other"), ['{"image": "0.png", "x": ' + "[" * 50 + "]" * 50 + "}"])
@case(
    "very deep lists",
    Refused("line 1 (cannot be read|.*within each other)"),
    ['{"image": "0.png", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"],
)
@case(
    "a number of 5000 digits",
    Refused("line 1 (cannot be read|.*64 bits)"),
    ['{"image": "0.png", "x": ' + "9" * 5000 + "}"],
)
@case("a number of 30 digits", Refused("line 1.*more than 64 bits"), ['{"image": "0.png", "x": ' + "9" * 30 + "}"])
@case("half a character", Refused("line 1.*half of a character"), ['{"image": "0.png", "caption": "\\ud83d"}'])
@case(
    "a caption now text, now a number",
    Refused(r"line 2: 'caption' is a number, but text in .*line 1"),
    [{"image": "0.png", "caption": "x"}, {"image": "1.png", "caption": 5}],
)
@case(
    "a caption now text, now a list",
    Refused("line 2: 'caption' is a list, but text"),
    [{"image": "0.png", "caption": "x"}, {"image": "1.png", "caption": ["y"]}],
)
@case(
    "mixed lists", Refused(r"line 1: 'captions.\[\]' is a number, but text"), [{"image": "0.png", "captions": ["x", 5]}]
)
@case(
    "true and 1",
    Refused("line 2: 'x' is a number, but true or false"),
    [{"image": "0.png", "caption": "x", "x": True}, {"image": "0.png", "caption": "x", "x": 1}],
)
@case(
    "2000 columns", Refused("line 1: more than 1000 columns"), [{"image": "0.png"} | {f"c{i}": i for i in range(2000)}]
)
@case(
    "numbers that are none",
    Reads(2),
    ['{"image": "0.png", "caption": "x", "x": NaN}', {"image": "1.png", "caption": "x"}],
)
@case(
    "README's caption and captions",
    Reads(3),
    [
        {"image": "0.png", "caption": "x"},
        {"image": "1.png", "captions": ["y", "z"]},
        {"image": "2.png", "caption": "x"},
    ],
)
@case(
    "a key twice",
    Reads(2),
    ['{"image": "no.png", "image": "0.png", "caption": "x"}', {"image": "1.png", "caption": "x"}],
)
@case(
    "captions of blanks",
    Reads(3, 1, "1 caption.s. missing, empty or not text"),
    [{"image": f"{i}.png", "caption": " \n\t " if i == 3 else "x"} for i in range(4)],
)
@case(
    "no caption in a row",
    Reads(3, 1, "missing, empty"),
    [{"image": f"{i}.png", "caption": "x" if i else None} for i in range(4)],
)
@case(
    "a caption of 2 MB",
    Reads(2),
    [{"image": "0.png", "caption": "word " * 400_000}, {"image": "1.png", "caption": "x"}],
)
@case(
    "captions that repeat",
    Reads(2),
    [{"image": "0.png", "captions": ["x"] * 5000}, {"image": "1.png", "captions": ["x"]}],
)
@case("control characters", Reads(2), [{"image": "0.png", "caption": "\0\x1b[2J"}, {"image": "1.png", "caption": "x"}])
@case("columns like paths", Reads(2), [{"image": "0.png", "caption": "x", "a.b": 1, "a": {"b": "y"}, "": {}}] * 2)
def lines(folder: Path, rows: list) -> str:
    good_rows(folder)
    return jsonl(folder, rows)


@case("latin-1", Refused(r"is no text in UTF-8 .*byte \d+"), '{"image": "0.png", "caption": "schön"}'.encode("latin-1"))
@case("utf-16", Refused("is no text in UTF-8"), '{"image": "0.png", "caption": "x"}'.encode("utf-16"))
@case("random bytes", Refused("(is no text in UTF-8|is not JSON)"), bytes(range(256)))
@case("zeros", Refused("line 1 is not JSON"), bytes(100))
@case(
    "a byte order mark",
    Reads(2),
    b"\xef\xbb\xbf" + b'{"image": "0.png", "caption": "x"}\n{"image": "1.png", "caption": "x"}',
)
@case(
    "the line ends of Windows",
    Reads(2),
    b'{"image": "0.png", "caption": "x"}\r\n{"image": "1.png", "caption": "x"}\r\n',
)
@case(
    "a line of 20 MB", Refused("line 1 has more than"), b'{"image": "0.png", "caption": "' + b"x" * 20_000_000 + b'"}'
)
@case("a Parquet file", Refused("(is no text in UTF-8|is not JSON)"), b"PAR1\x15\x04\xff\xfe\x00")
@case("gzip", Refused("is no text in UTF-8"), b"\x1f\x8b\x08\x00\xff\xff\xff")
def bytes_called_jsonl(folder: Path, data: bytes) -> str:
    good_rows(folder)
    (folder / "set.jsonl").write_bytes(data)
    return str(folder / "set.jsonl")


@case("a list", Reads(2), '[{"image": "0.png", "caption": "x"}, {"image": "1.png", "caption": "x"}]')
@case("lines", Reads(2), '{"image": "0.png", "caption": "x"}\n{"image": "1.png", "caption": "x"}')
@case("an empty list", Refused("holds no rows"), "[]")
@case("a list of null", Refused("set.json, row 1 holds nothing"), "[null, null]")
@case("a list of lists", Refused("row 1 holds a list"), "[[1], [2]]")
@case("a cut list", Refused("is not JSON"), '[{"image": "0.png"}, ')
@case("an object over several lines", Refused("line 1 is not JSON"), '{\n "data": []\n}')
@case("empty", Refused("holds no rows"), "")
@case("deep", Refused("set.json cannot be read"), "[" * 100_000)
def json_file(folder: Path, text: str) -> str:
    good_rows(folder)
    (folder / "set.json").write_text(text)
    return str(folder / "set.json")


# --------------------------------------------------------------------------------------------------------------- csv
@case("only a header", Refused("holds no rows"), "image,caption\n")
@case("empty", Refused("holds no rows"), "")
@case(
    "two columns of a name",
    Refused("line 1: every column needs a name of its own, and 'caption' is none"),
    "image,caption,caption\n0.png,x,y\n",
)
@case("a column without name", Refused("every column needs a name"), "image,\n0.png,x\n")
@case("commas in a caption", Refused("line 2 has 4 fields for 2 columns"), "image,caption\n0.png,a dog, a cat, a hen\n")
@case("an open quote", Refused(r"line \d: unexpected end of data"), 'image,caption\n0.png,"a dog\n1.png,x\n')
@case("text after a quote", Refused("line 2: "), 'image,caption\n0.png,"a dog" runs\n')
@case("semicolons", Refused("none of image;caption looks like pictures"), "image;caption\n0.png;x\n")
@case("tabs", Refused("looks like pictures"), "image\tcaption\n0.png\tx\n")
@case(
    "a field of 200,000 letters",
    Refused("line 2: field larger than field limit"),
    "image,caption\n0.png," + "x" * 200_000,
)
@case("captions of numbers", Refused("not text"), "image,caption\n0.png,1\n1.png,2\n2.png,3\n3.png,4.5\n")
@case("a NUL", Refused("(NUL|cannot be found)"), "image,caption\n0.png\0,x\n")
@case("no header", Refused("looks like (pictures|captions)"), "0.png,a dog\n1.png,a cat\n")
@case("short rows", Reads(2, 1, "^2.png: 1 caption"), "image,caption\n0.png,x\n1.png,y\n2.png\n")
@case("blank lines", Reads(2), "image,caption\n\n0.png,x\n\n1.png,y\n")
@case("line breaks in a caption", Reads(2), 'image,caption\n0.png,"a\ndog"\n1.png,y\n')
@case("formulas", Reads(2), 'image,caption\n0.png,"=HYPERLINK(""http://x"")"\n1.png,y\n')
@case("captions of which some are numbers", Reads(3), "image,caption\n0.png,1\n1.png,a dog\n2.png,2\n")
def comma_separated(folder: Path, text: str) -> str:
    good_rows(folder)
    (folder / "set.csv").write_text(text)
    return str(folder / "set.csv")


@case("text", Refused("is no Parquet file"), lambda data: b"I am no parquet")
@case("empty", Refused("is no Parquet file"), lambda data: b"")
@case("the marks at both ends", Refused("is no Parquet file"), lambda data: b"PAR1" + bytes(20) + b"PAR1")
@case("cut", Refused("is no Parquet file"), lambda data: data[: len(data) // 2])
@case("without its end", Refused("is no Parquet file"), lambda data: data[:-4])
@case("a footer of 4 GB", Refused("is no Parquet file"), lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1")
@case("a footer of zeros", Refused("is no Parquet file"), lambda data: data[:-108] + bytes(100) + data[-8:])
def parquet(folder: Path, damage: Callable[[bytes], bytes]) -> str:
    source = Path(as_parquet(folder, good_rows(folder)))
    source.write_bytes(damage(source.read_bytes()))
    return str(source)


# ----------------------------------------------------------------------------------------------------------- columns
NO_PICTURES = "column 'image' holds no pictures but .*: name their column with --image-column"


@case("numbers", Refused(NO_PICTURES), [1, 2, 3, 4])
@case("fractions", Refused(NO_PICTURES), [1.5, 2.5, 3.5, 4.5])
@case("true and false", Refused(NO_PICTURES), [True, False, True, False])
@case("lists in lists", Refused(NO_PICTURES), [[["0.png"]]] * 4)
@case("lists of numbers", Refused(NO_PICTURES), [[1]] * 4)
@case("objects", Refused(NO_PICTURES), [{"url": "0.png"}] * 4)
@case("nothing", Refused("only 0 of 4 examples can be used; the first: row 1: there is no picture"), [None] * 4)
@case("empty lists", Refused("only 0 of 4 examples.*there is no picture"), [[], [], [], []])
@case("lists of nothing", Refused("only 0 of 4 examples.*there is no picture"), [[None]] * 4)
@case("some nothing", Reads(3, 1, "row 2: there is no picture"), ["0.png", None, "1.png", "2.png"])
@case("some lists nothing", Reads(3, 1, "row 2: there is no picture"), [["0.png"], None, ["1.png"], ["2.png"]])
@case("some lists empty", Reads(3, 1, "row 2: there is no picture"), [["0.png"], [], ["1.png"], ["2.png"]])
@case("a path in an object", Reads(4), [{"path": f"{i}.png", "bytes": None} for i in range(4)])
def picture_column(folder: Path, values: list) -> str:
    good_rows(folder)
    return jsonl(folder, [{"image": value, "caption": "x"} for value in values])


@case("no such picture column", Refused("has no column 'nose': it has image, caption"), {"image_column": "nose"})
@case("no name for pictures", Refused("has no column ''"), {"image_column": ""})
@case("no such caption column", Refused("has no column 'nose'"), {"caption_columns": "caption,nose"})
@case("no name for captions", Refused("has no column ''"), {"caption_columns": ""})
@case("a comma too many", Refused("has no column ''"), {"caption_columns": "caption,"})
@case("captions as pictures", Refused("only 0 of 4 examples"), {"image_column": "caption", "caption_columns": "image"})
@case("5000 letters", Refused("has no column 'x+…x+'"), {"image_column": "x" * 5000})
@case("a line break", Refused("has no column"), {"image_column": "a\nb"})
def named_columns(folder: Path, names: dict) -> dict:
    return {"source": jsonl(folder, good_rows(folder)), **names}


# ------------------------------------------------------------------------------------------------ texts and documents
two = ["0.png", "1.png"]


@case("no tag for two pictures", Reads(3, 1, "0 <image> tags for 2 pictures"), two, "both show dogs")
@case("one tag for two", Reads(3, 1, "1 <image> tags for 2 pictures"), two, "<image>a dog")
@case("three tags for two", Reads(3, 1, "3 <image> tags for 2 pictures"), two, "<image>a<image>b<image>c")
@case("tags without pictures", Reads(3, 1, "there is no picture"), [], "<image>a dog")
@case("text without pictures", Reads(3, 1, "there is no picture"), [], "a dog")
@case("only tags", Reads(3, 1, "no caption in the text"), two, "<image><image>")
@case("only tags and ends", Reads(3, 1, "no caption"), two, "<image><|endofchunk|><image><|endofchunk|>")
@case("only a tag", Reads(3, 1, "no caption"), ["0.png"], "<image>")
@case("an end before any picture", Reads(3, 1, "that ends no caption"), two, "<|endofchunk|><image>a<image>b")
@case("two ends", Reads(3, 1, "that ends no caption"), two, "<image>a<|endofchunk|>x<|endofchunk|><image>b")
@case("only an end", Reads(3, 1, "no caption"), ["0.png"], "<|endofchunk|>")
@case("the first picture without caption", Reads(4), two, "<image><image>both show dogs")
@case("an end after a caption", Reads(4), ["0.png"], "a dog<|endofchunk|>")
@case("text about the one picture before it", Reads(4), ["0.png"], "look <image> a dog")
@case("other special tokens", Reads(4), ["0.png"], "</s><pad><s> a dog <|endoftext|>")
@case("a picture twice", Reads(4), ["0.png", "0.png"], "<image>a<image>b")
@case("one of two missing", Reads(3, 1, "is missing"), ["0.png", "no.png"], "<image>a<image>b")
@case("one of two nothing", Reads(3, 1, "there is no picture"), ["0.png", None], "<image>a<image>b")
@case("200 pictures", Reads(4), ["0.png"] * 200, "<image>a" * 200)
def document(folder: Path, images: list, text: str) -> str:
    good_rows(folder)
    return jsonl(folder, [*({"images": [f"{i}.png"], "text": f"<image>the number {i}"} for i in range(3)),
                          {"images": images, "text": text}])  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- folders
def put(path: Path, data: str | bytes = whole_png) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


META = "\n".join(json.dumps({"file_name": f"{i}.png", "caption": "x"}) for i in range(3))
PICTURES = {f"{i}.png": whole_png for i in range(3)}


@case("nothing", Refused("is empty"), {})
@case("hidden files", Refused("is empty"), {".DS_Store": "x", "._0.png": whole_png, ".git/0.png": whole_png})
@case("notes only", Refused("holds neither pictures nor tables"), {"notes.txt": "x", "a.zip": "PK"})
@case("pictures without captions", Refused("none of image looks like captions"), PICTURES)
@case(
    "pictures beside a table",
    Refused("holds pictures and tables but no metadata.jsonl: name the table itself"),
    PICTURES | {"captions.csv": "image,caption\n0.png,x\n"},
)
@case(
    "two metadata",
    Refused("has a metadata.jsonl and another beside it"),
    PICTURES | {"metadata.jsonl": META, "metadata.csv": "file_name\n0.png"},
)
@case(
    "metadata alone",
    Refused("only 0 of 3 examples can be used; the first: 0.png: is missing"),
    {"metadata.jsonl": META},
)
@case("empty metadata", Refused("metadata.jsonl holds no rows"), PICTURES | {"metadata.jsonl": ""})
@case("metadata of null", Refused("metadata.jsonl, line 1 holds nothing"), PICTURES | {"metadata.jsonl": "null\nnull"})
@case(
    "metadata without file_name",
    Refused("none of name, caption looks like pictures"),
    PICTURES | {"metadata.jsonl": '{"name": "0.png", "caption": "x"}'},
)
@case("file_name a number", Refused(NO_PICTURES), PICTURES | {"metadata.jsonl": '{"file_name": 5, "caption": "x"}'})
@case("metadata.csv", Reads(3), PICTURES | {"metadata.csv": "file_name,caption\n0.png,x\n1.png,y\n2.png,z\n"})
@case(
    "a picture without a row",
    Reads(3, 1, "1 picture.s. that no metadata names, the first: train.png"),
    PICTURES | {"metadata.jsonl": META, "train.png": whole_png},
)
@case(
    "a run inside",
    Reads(3),
    PICTURES
    | {"metadata.jsonl": META, "run/training.png": whole_png, "run/metrics.jsonl": "{}", "run/summary.json": "{}"},
)
@case(
    "a run among class folders",
    Refused("none of image, label looks like captions"),
    {
        "cat/1.png": whole_png,
        "dog/2.png": whole_png,
        "run/training.png": whole_png,
        "run/metrics.jsonl": "{}",
        "run/resume.safetensors": "",
    },
)
@case(
    "splits by folder",
    Reads(6),
    {
        f"{split}/{name}": data
        for split in ("train", "test")
        for name, data in (PICTURES | {"metadata.jsonl": META}).items()
    },
)
@case(
    "metadata of both splits",
    Reads(3),
    {f"train/{name}": data for name, data in PICTURES.items()}
    | {"metadata.jsonl": META.replace('"0', '"train/0').replace('"1', '"train/1').replace('"2', '"train/2')},
)
@case(
    "a split without captions",
    Refused("its test split has no column 'caption', but train has"),
    {f"train/{name}": data for name, data in (PICTURES | {"metadata.jsonl": META}).items()}
    | {"test/0.png": whole_png, "test/metadata.jsonl": '{"file_name": "0.png", "remark": "x"}'},
)
@case(
    "tables that are splits",
    Reads(5),
    {
        "train.csv": "image,caption\npics/0.png,x\npics/1.png,y\npics/2.png,z",
        "test.csv": "image,caption\npics/0.png,x\npics/1.png,y",
        ".x": "x",
    }
    | {f"pics/{name}.bin": data for name, data in PICTURES.items()},
)
@case(
    "a table that is none",
    Refused("other.csv, line 1"),
    {"train.csv": "image,caption\n0.png,x", "other.csv": "a,a\n1,2"},
)
@case("tables of two kinds", Refused("a split is of one kind"), {"train.parquet": "PAR1", "train2.csv": "a\n1"})
@case(
    "a single picture",
    Refused("has 1 usable example: training needs at least 2"),
    {"0.png": whole_png, "metadata.jsonl": '{"file_name": "0.png", "caption": "x"}'},
)
def a_folder(folder: Path, files: dict) -> str:
    for name, data in files.items():
        put(folder / name, data)
    if "train.csv" in files and "test.csv" in files:  # pictures by another suffix, so that only the tables count
        for table in ("train.csv", "test.csv"):
            put(folder / table, files[table].replace(".png", ".png.bin"))
    return str(folder)


def test_metadata_that_is_a_link_outside_is_not_read(tmp_path):
    (tmp_path / "set").mkdir()
    put(tmp_path / "secret.jsonl", META)
    (tmp_path / "set" / "metadata.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(InputError, match="outside of its folder"):
        load_captions(str(tmp_path / "set"))


# ------------------------------------------------------------------------------------------------------------ sources
@case("of 300 letters", Refused("(no such file|cannot)"), "x/" + "y" * 300)
@case("of 300 letters, no folder", Refused("(no such file|cannot)"), "y" * 300)
@case("with a NUL", Refused("no such file"), "a\0b")
@case("empty", Refused("--data is empty"), "")
@case("a device", Refused("neither a folder nor a regular file"), "/dev/zero")
@case("a URL", Refused("no such file or folder"), "http://localhost:1/x")
@case("a chain", Refused("no such file or folder"), "zip://a::b")
@case("a bucket", Refused("no such file or folder"), "s3://bucket/x")
@case("a table that is not there", Refused("no such file or folder"), "captions.jsonl")
@case("no hub name", Refused("no such file or folder"), "a b/c d")
@case("a parent", Refused("no such file or folder"), "../../nowhere/at all")
@case("of another kind", Refused("expected a folder or a file ending in"), "FOLDER/set.xlsx")
@case("a pipe", Refused("neither a folder nor a regular file"), "FOLDER/pipe.jsonl")
def a_source(folder: Path, name: str) -> str:
    if name.startswith("FOLDER/"):
        (os.mkfifo if "pipe" in name else Path.touch)(folder / name[7:])
    return name.replace("FOLDER", str(folder))


# -------------------------------------------------------------------------------------------------------- the campaign
def check(build: Callable, arguments: tuple, expected: Refused | Reads, tmp_path: Path) -> list[CaptionedPictures]:
    """Build a set, load it, and see that what must come of it came of it; returns its splits."""
    folder = tmp_path / "set"
    folder.mkdir()
    picture().save(tmp_path / OUTSIDE)
    how = build(folder, *arguments)
    how = how if isinstance(how, dict) else {"source": how}
    before = state_of(tmp_path)
    splits = {}
    if isinstance(expected, Refused):
        with pytest.raises(InputError, match=expected.why) as caught:
            load_captions(**how)
        one_sentence(str(caught.value))
    else:
        splits = load_captions(**how)
        left_out = [line for split in splits.values() for line in split.skipped]
        assert sum(map(len, splits.values())) == expected.examples, left_out
        assert len(left_out) == expected.left_out, left_out
        assert not left_out or re.search(expected.why, left_out[0]), left_out
        for line in left_out:
            one_sentence(line)
    assert state_of(tmp_path) == before
    return list(splits.values())


@pytest.mark.parametrize("build, arguments, expected", CASES)
def test_campaign(build, arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in check(build, arguments, expected, tmp_path):
        for i in range(len(split)):
            example = split[i]
            assert example.pictures and example.texts  # every text has a picture, and all pictures are RGB and small
            assert all(p.mode == "RGB" and p.width * p.height <= LARGE for p in example.pictures)
            shown = [chunk.picture for text in example.texts for chunk in text if chunk.picture is not None]
            assert set(shown) == set(range(len(example.pictures)))
            assert any(chunk.caption for text in example.texts for chunk in text)


@pytest.mark.parametrize("build, arguments, expected", BOMBS)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of memory")
def test_bombs_do_not_go_off(build, arguments, expected, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    build(made)  # that building a bomb takes memory is no fault
    assert peak_memory(lambda: check(build_from(made), (), expected, tmp_path)) < 150 * 2**20


def build_from(made: Path) -> Callable[[Path], str]:
    def build(folder: Path) -> str:
        for file in made.iterdir():
            file.rename(folder / file.name)
        return str(folder / "set.jsonl")

    return build


def test_the_campaign_is_as_large_as_promised():
    assert len(CASES) + len(BOMBS) >= 200
    names = [entry.id for entry in (*CASES, *BOMBS)]
    assert len(set(names)) == len(names)
