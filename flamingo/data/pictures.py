"""A picture file → an RGB picture, whatever it is, in bounded memory.

What this file teaches: a picture file is a small program for a large buffer. A PNG of 0.7 MB may ask for 700 MB, and an
EPS called beach.jpg is a program in earnest. So the formats are named (Pillow tries no other decoder), the size is read
before a pixel is decoded, and what is far larger than any encoder reads is reduced on the way, by the JPEG decoder
itself where it can.
"""

import io
import math
import warnings
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps

from flamingo.data.dicom import decode_dicom, is_dicom
from flamingo.data.places import Place, Unusable, read_regular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".avif", ".dcm", ".dicom",
)  # fmt: skip
# Bits that count, of a picture with more than 8: X-rays of 12 bits lie in files of 16, and would be nearly black.
DEPTHS = (8, 10, 12, 14, 16)
MOST_PIXELS = 64_000_000  # that are decoded: 256 MB
LARGE = 16_000_000  # a picture with more pixels is reduced; encoders read 50,000 to 1,000,000
MOST_ASPECT = 200  # resizing the short side of a thinner picture to an encoder's size makes the long side immense
REDUCIBLE = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F")  # modes whose neighbouring pixels have a mean


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode → RGB, upright: transparency falls on white, 10 to 16 bits become 8."""
    picture = _upright(picture)
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 or 32 bits a pixel: convert() would clip at 255
        values = picture.convert("F")
        white = next((2**bits - 1 for bits in DEPTHS if values.getextrema()[1] < 2**bits), values.getextrema()[1])
        return values.point(lambda value: value * (255 / white)).convert("L").convert("RGB")
    if picture.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    """As its EXIF says it was held; as it is if that cannot be read: it is no fault of the picture's."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Pillow raises many kinds, here too
        return picture


@cache
def _formats() -> list[str]:
    """Those of FORMATS that this Pillow can open."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def picture_bytes(value, base: Path, place: Place) -> bytes:
    """The file itself of what a data set holds of a picture: its name, its bytes, or {"bytes", "path"}.

    base: the folder that names count from. Raises Unusable if there is none, InputError if it is not to be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise Unusable("there is no picture")
    return read_regular(place.find(value, base))


def open_picture(file: bytes | str | Path, *, thumbnail: bool = False) -> Image.Image:
    """A picture file → RGB, of at most LARGE pixels.

    thumbnail: only prove that it can be read; a JPEG is then decoded at an eighth of its size. Raises Unusable for what
    is no picture in one of FORMATS, too large, or too thin.
    """
    data = file if isinstance(file, bytes) else read_regular(Path(file))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow about sizes, for example: ours is an error
            if is_dicom(data):
                return to_rgb(_reduced(decode_dicom(data, MOST_PIXELS)))
            with Image.open(io.BytesIO(data), formats=_formats()) as picture:
                _decode(picture, 8 if thumbnail else math.sqrt(math.prod(picture.size) / LARGE))
                return to_rgb(_reduced(picture))
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"has more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise Unusable(f"cannot be read as a picture ({type(error).__name__})") from error


def _decode(picture: Image.Image, factor: float) -> None:
    """Load a picture, a JPEG at up to 1/factor of its width and height. Raises Unusable if it is too large or thin."""
    width, height = picture.size
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise Unusable(f"is {width} x {height} pixels: too thin")
    if factor > 1:
        picture.draft(None, (max(1, int(width / factor)), max(1, int(height / factor))))  # does nothing but for JPEG
    if math.prod(picture.size) > MOST_PIXELS:
        raise Unusable(f"is {width} x {height} pixels, and {MOST_PIXELS:,} are the limit")
    picture.load()


def _reduced(picture: Image.Image) -> Image.Image:
    """A picture of at most LARGE pixels."""
    factor = math.ceil(math.sqrt(math.prod(picture.size) / LARGE))
    if factor <= 1:
        return picture
    picture = _upright(picture)  # now: a reduced picture does not know how it was turned
    if picture.mode in REDUCIBLE:
        return picture.reduce(factor)
    return picture.resize((picture.width // factor, picture.height // factor), Image.Resampling.NEAREST)


def enlarged(picture: Image.Image, longest: int) -> Image.Image:
    """A drawn scene is 96 pixels wide: shown larger, or a photograph smaller."""
    scale = longest / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.LANCZOS)
