"""A DICOM file → a grey or coloured picture of eight bits, as it is looked at.

What this file teaches: the numbers in a DICOM are no brightness. Rescale slope and intercept make measurements of them,
a window says which of these go from black to white, and MONOCHROME1 counts from white to black. A model that was given
the numbers as they are would see most X-rays as negatives, or as night. (pydicom is optional: who has no DICOM does not
need it.)
"""

import io
import math

import numpy as np
from PIL import Image

from flamingo.data.places import Unusable


def is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def decode_dicom(data: bytes, most_pixels: int) -> Image.Image:
    """Raises Unusable for a file without pixels, with several frames, or too large, and where pydicom is missing or
    needs another package."""
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_modality_lut, apply_windowing
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
    if pixels.ndim == 3:
        return Image.fromarray(pixels.astype(np.uint8))

    values = apply_modality_lut(pixels, file).astype(np.float64)  # slope and intercept
    low, high = values.min(), values.max()
    if file.get("WindowWidth") is not None:
        ends = np.array([low - 1e9, high + 1e9])  # what the window makes of them is black and white
        values = apply_windowing(np.append(values, ends), file)
        (low, high), values = values[-2:], values[:-2].reshape(pixels.shape)
    grey = (values - low) / max(high - low, math.ulp(1.0))
    if file.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 1 - grey
    return Image.fromarray((255 * grey).round().astype(np.uint8))
