"""A DICOM file → a grey or coloured picture of eight bits, as it is looked at.

What this file teaches: the numbers in a DICOM are no brightness. Rescale slope and intercept make measurements of them,
a window says which of these go from black to white, and MONOCHROME1 counts from white to black. Some numbers are no
measurement at all: the padding around what was measured, and the numbers of a palette's colours. A model that was given
the numbers as they are would see most X-rays as negatives, or as night. (pydicom is optional: who has no DICOM does not
need it. Tables in place of a window, VOI LUT sequences, are not read.)
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from flamingo.data.places import Unusable


def is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def decode_dicom(data: bytes, most_pixels: int) -> Image.Image:
    """Raises Unusable for a file without pixels or without its palette, with several frames, or too large, and where
    pydicom is missing or needs another package."""
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_color_lut, apply_modality_lut
    except ImportError:
        raise Unusable("is a DICOM: pip install pydicom") from None

    file = dcmread(io.BytesIO(data))
    if not {"PixelData", "Rows", "Columns"} <= set(file.dir()):
        raise Unusable("is a DICOM without pixels")
    if (frames := int(file.get("NumberOfFrames") or 1)) > 1:
        raise Unusable(f"is a DICOM of {frames} frames: give each a file")
    if file.Rows * file.Columns > most_pixels:
        raise Unusable(f"is {file.Columns} x {file.Rows} pixels, and {most_pixels:,} are the limit")
    try:
        pixels = file.pixel_array  # (H, W), or (H, W, 3)
    except (RuntimeError, NotImplementedError) as error:
        kind = file.file_meta.TransferSyntaxUID.name
        raise Unusable(
            f"is a DICOM packed as {kind}, which needs another package: pip install pylibjpeg[all]"
        ) from error
    if file.PhotometricInterpretation == "PALETTE COLOR":
        table = file.get("RedPaletteColorLookupTableDescriptor")
        if table is None:
            raise Unusable("is a DICOM of palette colours without its palette")
        entries, first, bits = table
        # Numbers beyond the palette have its last colour; pydicom would count an 8-bit palette's from the front again.
        pixels = pixels.astype(np.int32).clip(first, first + (entries or 2**16) - 1)
        return _in_colours(apply_color_lut(pixels, file)[..., :3], bits)  # the fourth would be transparency
    if pixels.ndim == 3:
        return _in_colours(pixels, file.BitsStored)

    padding = _padding(pixels, file)
    values = apply_modality_lut(pixels, file).astype(np.float64)  # slope and intercept
    grey = _through_window(values, file)
    if grey is None:
        measured = values[~padding]
        low, high = (measured.min(), measured.max()) if measured.size else (0, 0)
        grey = (values - low) / max(high - low, math.ulp(1.0))
    if file.PhotometricInterpretation == "MONOCHROME1":
        grey = 1 - grey
    grey[padding] = 0  # the background, in a negative too
    return Image.fromarray((255 * grey).round().astype(np.uint8))


def _in_colours(pixels: np.ndarray, bits: int) -> Image.Image:
    """(H, W, 3), of `bits` bits a colour."""
    white = 2**bits - 1
    if white != 255:
        pixels = (pixels.clip(0, white) * (255 / white)).round()
    return Image.fromarray(pixels.astype(np.uint8))


def _padding(pixels: np.ndarray, file) -> np.ndarray:
    """(H, W) bool: which pixels only fill the picture up. They are known by what is stored, before slope and intercept,
    as one number or all between two."""
    first, last = file.get("PixelPaddingValue"), file.get("PixelPaddingRangeLimit")
    if first is None:
        return np.zeros(pixels.shape, dtype=bool)
    # In the pixels' own type: some scanners write the -2000 of a signed picture as 63536.
    ends = np.array([first, first if last is None else last]).astype(pixels.dtype)
    return (ends.min() <= pixels) & (pixels <= ends.max())


def _through_window(values: np.ndarray, file) -> np.ndarray | None:
    """Measurements → 0 … 1 through the window of the file (of several the first); None if it has none to look through.

    A window that lacks its centre, is too narrow for its function, or of an unknown function counts as none: all that
    was measured, if perhaps flat, is more of a picture than an error or a black one.
    """
    center, width = (_first(file.get(name)) for name in ("WindowCenter", "WindowWidth"))
    function = str(file.get("VOILUTFunction") or "LINEAR").upper()
    narrowest = {"LINEAR": 1, "LINEAR_EXACT": math.ulp(0.0), "SIGMOID": math.ulp(0.0)}.get(function, math.inf)
    if center is None or width is None or not narrowest <= width < math.inf or not math.isfinite(center):
        return None
    if function == "SIGMOID":
        return 0.5 + 0.5 * np.tanh(2 * (values - center) / width)
    if function == "LINEAR":  # counts the measurements in it, whole numbers
        center, width = center - 0.5, width - 1
    if width == 0:
        return (values > center).astype(np.float64)
    return ((values - center) / width + 0.5).clip(0, 1)


def _first(value) -> float | None:
    """The first of a field's values, which may have none, one or several."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return (value[0] if value else None) if several else value
