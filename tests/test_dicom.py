"""X-rays as they are looked at: DICOM (windows, slope, padding, colour, palettes); grey pictures of 10 to 16 bits."""

import io

import numpy as np
import pytest
from PIL import Image

from flamingo.data.pictures import open_picture
from flamingo.data.places import Unusable


def dicom(pixels: np.ndarray | None, **fields) -> bytes:
    """A file of 16 bits a pixel, MONOCHROME2 unless a field says otherwise."""
    pydicom = pytest.importorskip("pydicom", reason="DICOM needs pydicom: pip install pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.ExplicitVRLittleEndian, "1.2.3"
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    made = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    if pixels is not None:
        made.Rows, made.Columns = pixels.shape
        made.SamplesPerPixel, made.BitsAllocated, made.BitsStored, made.HighBit = 1, 16, 16, 15
        made.PixelRepresentation, made.PhotometricInterpretation = 0, "MONOCHROME2"
        made.PixelData = pixels.astype("<u2").tobytes()
    for name, value in fields.items():
        setattr(made, name, value)
    file = io.BytesIO()
    made.save_as(file, enforce_file_format=True)
    return file.getvalue()


RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 16  # 0 … 1008


def grey(data: bytes) -> np.ndarray:
    picture = np.array(open_picture(data))
    assert (picture[..., 0] == picture[..., 1]).all() and picture.shape == (8, 8, 3)
    return picture[..., 0].astype(int)


def test_a_dicom_is_read_as_it_is_looked_at():
    plain = grey(dicom(RAMP))
    assert plain[0, 0] == 0 and plain[-1, -1] == 255 and (np.diff(plain.flatten()) >= 0).all()
    assert (grey(dicom(RAMP, PhotometricInterpretation="MONOCHROME1")) == 255 - plain).all()
    window = {"WindowCenter": 504, "WindowWidth": 201}  # 404 … 604 go from black to white
    seen = grey(dicom(RAMP, **window))
    assert (seen[RAMP <= 400] == 0).all() and (seen[RAMP >= 608] == 255).all()
    assert abs(seen[RAMP == 496].item() - 255 * (496 - 404) / 200) <= 2
    shifted = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 8, "WindowWidth": 401}
    assert abs(grey(dicom(RAMP, **shifted)) - grey(dicom(RAMP, WindowCenter=504, WindowWidth=201))).max() <= 2
    several = grey(dicom(RAMP, WindowCenter=[504, 100], WindowWidth=[201, 50]))  # the first counts
    assert (several == seen).all()
    assert (grey(dicom(np.full((8, 8), 7))) == 0).all()  # all the same


FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
WINDOWS = [{"WindowCenter": 504, "WindowWidth": 201, "VOILUTFunction": function} for function in FUNCTIONS]
WINDOWS += [{"WindowCenter": 496.5, "WindowWidth": 1}, {}]  # a step, just above one of the measurements


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_a_negative_slope_makes_the_same_picture_of_the_same_measurements(window, kind):
    upwards = grey(dicom(RAMP, RescaleSlope=1, RescaleIntercept=0, PhotometricInterpretation=kind, **window))
    downwards = dicom(1008 - RAMP, RescaleSlope=-1, RescaleIntercept=1008, PhotometricInterpretation=kind, **window)
    assert (grey(downwards) == upwards).all() and upwards.min() == 0 and upwards.max() == 255


@pytest.mark.parametrize("window", WINDOWS[:-1])
def test_windows_are_those_of_pydicom(window):
    data = dicom(RAMP, **window)
    file = pytest.importorskip("pydicom").dcmread(io.BytesIO(data))
    theirs = __import__("pydicom.pixels", fromlist=["x"]).apply_windowing(file.pixel_array, file)  # 0 … 65535
    assert abs(grey(data) - theirs / 257).max() <= 0.51
    negative = grey(dicom(RAMP, PhotometricInterpretation="MONOCHROME1", **window))
    assert abs(negative + grey(data) - 255).max() <= 1


@pytest.mark.parametrize("window", [
    {"WindowWidth": 0, "WindowCenter": 504}, {"WindowWidth": -3, "WindowCenter": 504}, {"WindowWidth": 201},
    {"WindowCenter": 504}, {"WindowWidth": 201, "WindowCenter": None}, {"WindowWidth": 0.5, "WindowCenter": 504},
    {"WindowWidth": 0, "WindowCenter": 504, "VOILUTFunction": "SIGMOID"},
    {"WindowWidth": 201, "WindowCenter": 504, "VOILUTFunction": "CUBIC"},
])  # fmt: skip
def test_a_window_that_shows_nothing_counts_as_none(window):
    assert (grey(dicom(RAMP, **window)) == grey(dicom(RAMP))).all()


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 700, "WindowWidth": 401}])
@pytest.mark.parametrize("stored, fields", [
    (65535, {"PixelPaddingValue": 65535}), (0, {"PixelPaddingValue": 0}),
    (60001, {"PixelPaddingValue": 60000, "PixelPaddingRangeLimit": 60002}),
    (60001, {"PixelPaddingValue": 60002, "PixelPaddingRangeLimit": 60000}),
    (63536, {"PixelPaddingValue": -2000, "PixelRepresentation": 1}),
])  # fmt: skip
def test_padding_is_background_and_takes_no_grey_from_the_picture(stored, fields, window, kind):
    """The first two rows are padding; the rest is as bright as in a picture that has none."""
    fields = fields | window | {"PhotometricInterpretation": kind}
    pixels = np.vstack([np.full((2, 8), stored), RAMP[2:]])
    there = grey(dicom(pixels, **fields))
    assert (there[:2] == 0).all()
    without = np.vstack([RAMP[2:4], RAMP[2:]])
    assert (there[2:] == grey(dicom(without, **fields))[2:]).all() and there[2:].max() == 255 and there[2:].min() == 0
    assert (grey(dicom(np.full((8, 8), stored), **fields)) == 0).all()  # nothing but padding


def test_padding_of_a_signed_picture_written_without_its_sign():
    """63536 for -2000, as some scanners have it; in a file whose fields name their types nobody mends it."""
    pydicom = pytest.importorskip("pydicom")
    pixels = np.vstack([np.full((2, 8), 63536), RAMP[2:]])
    wrong = pydicom.DataElement(0x00280120, "US", 63536)
    file = pydicom.dcmread(io.BytesIO(dicom(pixels, PixelRepresentation=1)))
    file.add(wrong)
    data = io.BytesIO()
    file.save_as(data)
    there = grey(data.getvalue())
    assert (there[:2] == 0).all() and there[2, 0] == 0 and there[3, 0] > 30


def colours(pixels: np.ndarray, bits: int, kind: str = "RGB", **fields) -> np.ndarray:
    """The picture (H, W, 3) of a DICOM of (H, W, 3) or of (H, W) numbers of colours."""
    deep = 8 if bits <= 8 else 16
    depth = {"BitsAllocated": deep, "BitsStored": bits, "HighBit": bits - 1, "PixelRepresentation": 0}
    several = {"SamplesPerPixel": 3, "PlanarConfiguration": 0} if pixels.ndim == 3 else {"SamplesPerPixel": 1}
    fields |= {"Rows": pixels.shape[0], "Columns": pixels.shape[1], "PhotometricInterpretation": kind}
    return np.array(open_picture(dicom(
        None, PixelData=pixels.astype(f"<u{deep // 8}").tobytes(), **depth, **several, **fields)))  # fmt: skip


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_coloured_dicom_keeps_its_colours(bits):
    white = 2**bits - 1
    pixels = np.array([[[white, 0, 0], [0, 0, white]], [[white // 2 + 1, white // 4, 0], [white] * 3]])
    seen = colours(pixels, bits)
    assert seen[0].tolist() == [[255, 0, 0], [0, 0, 255]] and seen[1, 1].tolist() == [255, 255, 255]
    assert seen[1, 0, 0] == 128 and abs(int(seen[1, 0, 1]) - 64) <= 1


def test_brightness_and_colour_apart_are_put_together():
    """YBR_FULL, as most packed colours are: (Y, Cb, Cr) of red, of green, and of grey."""
    red, green, mid = [76, 85, 255], [150, 44, 21], [99, 128, 128]
    seen = colours(np.array([[red, green], [mid, mid]]), 8, "YBR_FULL").astype(int)
    assert abs(seen[0] - [[255, 0, 0], [0, 255, 0]]).max() <= 2 and (seen[1] == 99).all()


@pytest.mark.parametrize("bits, stored", [(8, "<u1"), (16, "<u2"), (8, "<u2")])
def test_a_palette_gives_its_colours(bits, stored):
    """Four colours, numbered from 3; what is below has the first, what is beyond the last."""
    white = 2**bits - 1
    tables = np.array([[white, 0, 0], [0, white, 0], [0, 0, white], [white, white, 0]], dtype=stored).T
    names = ("Red", "Green", "Blue")
    palette = {f"{name}PaletteColorLookupTableData": table.tobytes() for name, table in zip(names, tables, strict=True)}
    palette |= {f"{name}PaletteColorLookupTableDescriptor": [4, 3, bits] for name in names}
    seen = colours(np.array([[3, 4, 5], [6, 0, 259]]), 16, "PALETTE COLOR", **palette)
    red, green, blue, yellow = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]
    assert seen.tolist() == [[red, green, blue], [yellow, red, yellow]]
    with pytest.raises(Unusable, match="is a DICOM of palette colours without its palette"):
        colours(np.array([[3, 4]]), 8, "PALETTE COLOR")


@pytest.mark.parametrize("made, message", [
    (lambda: dicom(None), "is a DICOM without pixels"),
    (lambda: dicom(RAMP, NumberOfFrames=3), "is a DICOM of 3 frames"),
    (lambda: dicom(RAMP, Rows=60000, Columns=60000), "is 60000 x 60000 pixels"),
    (lambda: dicom(RAMP)[:-9], "cannot be read as a picture"), (lambda: dicom(RAMP)[:140], "without pixels"),
    (lambda: b"\0" * 128 + b"DICM" + b"nonsense" * 9, "DICOM|cannot be read"),
])  # fmt: skip
def test_dicoms_that_cannot_be_read(made, message):
    with pytest.raises(Unusable, match=message):
        open_picture(made())


def test_a_dicom_without_pydicom_names_the_package(monkeypatch):
    data = dicom(RAMP)
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(Unusable, match="pip install pydicom"):
        open_picture(data)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_deep_grey_pictures_use_all_of_black_to_white(bits):
    """An X-ray of 12 bits in a PNG of 16 would be nearly black if it were divided by 65535."""
    values = (np.linspace(0, 1, 64) * (2**bits - 1)).astype(np.uint16).reshape(8, 8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    assert abs(grey(file.getvalue()) - np.linspace(0, 255, 64).reshape(8, 8)).max() <= 1.5
