"""Patch features of the frozen encoder, computed once and read from disk ever after.

What this file teaches: the encoder is two thirds of the work of a training step, and its output never changes, because
it is frozen. So each picture is encoded once. The features lie in one .npy file, a row a picture:

    CACHE/NAME/features.npy     (pictures, F, v, d) float16, read through a memory map: only what is used is loaded
    CACHE/NAME/rows.crc32       4 bytes for each finished row: how far a build has come, and a checksum of the row
    CACHE/NAME/meta.json        the key: what the features were made of

float16 because it is half the disk (ViT-L-14: 0.5 MB a picture) and an error of one part in 2000, far below what a
gradient step changes. A row counts as finished only after its data has reached the disk, so a killed build goes on
where it stopped. A cache of other weights, another preprocessing or other pictures, or a damaged one, is built again;
and as disks and memory fail in between too, a row is compared with its checksum whenever it is read.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from filelock import Timeout
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from flamingo.data.batches import Example, end_with_the_run
from flamingo.data.captions import CaptionedPictures
from flamingo.errors import InputError
from flamingo.files import lock_of, remove_unfinished, write_json
from flamingo.model.vision import VisionEncoder

AT_ONCE = 16  # pictures encoded together, and made safe on disk together


def cache_key(encoder: VisionEncoder, data_fingerprint: str) -> str:
    """What features depend on. Two preprocessings are the same if they do the same to a test picture."""
    ramp = Image.linear_gradient("L")
    probe = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180))).resize((317, 211))
    prepared = hashlib.sha256(encoder.preprocess(probe).numpy().tobytes()).hexdigest()[:16]
    read = f"norm={encoder.norm} class_token={encoder.class_token}"  # the weights' fingerprint knows neither
    return f"{encoder.name} {encoder.fingerprint} {read} preprocess={prepared} data={data_fingerprint}"


class FeatureCache:
    """Features of numbered pictures. `cache[3:5]` is (2, F, v, d) float16. Get one from `open_or_build`.

    Args:
        folder: where its three files are. shape: (F, v, d). rows: pictures. key: see `cache_key`.
    """

    def __init__(self, folder: Path, rows: int, shape: tuple[int, ...], key: str):
        self.folder, self.rows, self.shape, self.key = folder, rows, tuple(shape), key
        self.features, self.checksums, self.meta = (
            folder / name for name in ("features.npy", "rows.crc32", "meta.json")
        )
        header = io.BytesIO()
        layout = {"descr": "<f2", "fortran_order": False, "shape": (rows, *self.shape)}
        np.lib.format.write_array_header_1_0(header, layout)
        self.header, self.row_bytes = header.getvalue(), 2 * math.prod(self.shape)

    @classmethod
    def open_or_build(
        cls,
        folder: Path,
        pictures: Dataset,
        key: str,
        encoder: VisionEncoder,
        *,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> "FeatureCache":
        """The cache in `folder`: as it is if it is whole and fits `key`, else completed or built again, with a message.

        Args:
            pictures: `pictures[i]` is (F, C, H, W), prepared for the encoder.
            device, workers: where the encoder is, and processes that prepare pictures.

        Raises:
            InputError: no picture, too little disk, the folder cannot be written, or the encoder gives features too
                large for float16 or of another number than for the first picture.
        """
        if not len(pictures):
            raise InputError(f"the feature cache {folder} is for no picture: there is none to encode")
        first = pictures[0]
        shape = (len(first), *encoder(first.to(device)).shape[1:])
        cache = cls(folder, len(pictures), shape, key)
        with _only_one_builder(folder), _using(folder):
            fault = cache._fault()
            if fault:
                print(f"feature cache {folder}: {fault}; building it again")
                cache._remove()
            if cache.finished() < cache.rows:
                cache._build(pictures, encoder, device, workers)
        return cache

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, pictures: slice) -> Tensor:
        """Raises InputError if a row is not what was written."""
        numbers = range(*pictures.indices(self.rows))
        rows = np.empty((len(numbers), *self.shape), dtype="<f2")
        # Opened at each reading: it takes 0.1 ms, and nothing has to be handed to worker processes.
        with _using(self.folder), open(self.features, "rb") as data, open(self.checksums, "rb") as sums:
            for row, number in zip(rows, numbers, strict=True):
                data.seek(len(self.header) + number * self.row_bytes)
                sums.seek(4 * number)
                file = data.read(self.row_bytes)
                if len(file) < self.row_bytes or zlib.crc32(file) != int.from_bytes(sums.read(4), "little"):
                    raise InputError(
                        f"picture {number} of the feature cache {self.folder} has changed since it was written: start "
                        "again, and it is built anew"
                    )
                row[:] = np.frombuffer(file, dtype="<f2").reshape(self.shape)
        return torch.from_numpy(rows)

    def finished(self) -> int:
        """Rows that have reached the disk."""
        return self.checksums.stat().st_size // 4 if self.checksums.exists() else 0

    def _fault(self) -> str | None:
        """What is wrong with the files that are there; None if they are whole, a good beginning, or absent."""
        if not self.meta.exists():
            return None if not self.features.exists() else "it has no meta.json"
        try:
            made_of = json.loads(self.meta.read_text(encoding="utf-8"))["key"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return "its meta.json is damaged"
        if made_of != self.key:
            return "it was made with other weights, preprocessing or pictures"
        done = self.finished()
        if done == 0:
            return None
        if not self.features.exists() or done > self.rows:
            return "its files do not belong together"
        with open(self.features, "rb") as file:
            if file.read(len(self.header)) != self.header:
                return "the header of features.npy is damaged"
            size = self.features.stat().st_size - len(self.header)
            if size < done * self.row_bytes or (done == self.rows and size != done * self.row_bytes):
                return "features.npy has the wrong size"
            expected = np.fromfile(self.checksums, dtype="<u4")
            for row in tqdm(range(done), desc="checking features", disable=done < 5000, leave=False):
                if zlib.crc32(file.read(self.row_bytes)) != expected[row]:
                    return f"row {row} does not match its checksum"
        return None

    def _remove(self) -> None:
        for path in (self.checksums, self.features, self.meta):  # without checksums the rest counts for nothing
            path.unlink(missing_ok=True)

    @torch.no_grad()
    def _build(self, pictures: Dataset, encoder: VisionEncoder, device: torch.device | str, workers: int) -> None:
        done, megabytes = self.finished(), self.rows * self.row_bytes / 1e6
        free = shutil.disk_usage(self.folder).free / 1e6
        print(
            f"feature cache {self.folder}: {megabytes:.0f} MB for {self.rows} pictures, made once"
            + (f"; {done} are there already" if done else "")
        )
        if (self.rows - done) * self.row_bytes / 1e6 > free:
            raise InputError(
                f"the feature cache {self.folder} needs {megabytes:.0f} MB and the disk has {free:.0f} MB free: "
                "choose another folder with --cache, or --cache off"
            )
        write_json(self.meta, {"key": self.key, "pictures": self.rows, "shape": self.shape})
        loader = DataLoader(
            Subset(pictures, range(done, self.rows)), batch_size=AT_ONCE, num_workers=workers,
            worker_init_fn=end_with_the_run,
        )  # fmt: skip
        bar = tqdm(total=self.rows, initial=done, desc="encoding pictures", unit="picture")
        with open(self.features, "r+b" if done else "wb") as data, open(self.checksums, "ab") as sums, bar:
            sums.truncate(done * 4)  # a kill may have left a part of an entry
            data.write(self.header)
            data.seek(len(self.header) + done * self.row_bytes)
            data.truncate()  # and rows that no checksum vouches for
            for pixels in loader:  # (up to AT_ONCE, F, C, H, W)
                features = encoder(pixels.flatten(0, 1).to(device)).half().cpu()
                if not features.isfinite().all():
                    raise InputError(f"{encoder.name} gives features too large for float16: use --cache off")
                rows = features.reshape(len(pixels), -1).numpy().astype("<f2")
                if rows[0].nbytes != self.row_bytes:
                    raise InputError(f"{encoder.name} gives pictures different numbers of features: use --cache off")
                data.write(rows.tobytes())
                _to_disk(data)
                sums.write(np.array([zlib.crc32(row.tobytes()) for row in rows], dtype="<u4").tobytes())
                _to_disk(sums)
                bar.update(len(rows))


def _to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _using(folder: Path) -> Iterator[None]:
    """A full disk or a folder that cannot be read and written is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot use the feature cache {folder}: {error.strerror or error}. "
            "Choose another folder with --cache, or --cache off"
        ) from error


@contextlib.contextmanager
def _only_one_builder(folder: Path) -> Iterator[None]:
    """Two runs may want the same cache: the second waits for the first. A lock ends with its process."""
    lock = lock_of(folder / "lock")
    with _using(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            print(f"feature cache {folder}: another run is building it; waiting")
            held = lock.acquire()
    with held:
        remove_unfinished(folder)
        yield


class _PreparedPictures(Dataset):
    """Every picture of a captioned set, prepared for an encoder: (F=1, C, H, W)."""

    def __init__(self, examples: CaptionedPictures, encoder: VisionEncoder):
        self.examples, self.preprocess = examples, encoder.preprocess

    def __len__(self) -> int:
        return len(self.examples.numbered)

    def __getitem__(self, number: int) -> Tensor:
        return self.preprocess(self.examples.picture(number))[None]


class ExamplesWithFeatures(Dataset):
    """A captioned set whose examples bring features in place of pictures."""

    curriculum = ()

    def __init__(self, examples: CaptionedPictures, cache: FeatureCache):
        self.examples, self.cache, self.length = examples, cache, examples.length

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return Example((), self.examples.texts(index), self.cache[self.examples.numbers(index)])


def with_cached_features(
    examples: Dataset, encoder: VisionEncoder, cache: str, *, device: torch.device | str = "cpu", workers: int = 0
) -> Dataset:
    """The same examples with features from a cache below the folder `cache`, which is built if need be.

    With `cache` "off", and for scenes that are drawn anew each time, the examples as they are.
    """
    if cache == "off" or not isinstance(examples, CaptionedPictures):
        return examples
    source = Path(examples.source).expanduser()
    found = f"{source.resolve() if source.exists() else source} {examples.name} {encoder.name}"
    place = hashlib.sha256(found.encode()).hexdigest()
    name = f"{re.sub(r'[^A-Za-z0-9]+', '-', examples.where).strip('-')[-60:]}-{place[:8]}"
    built = FeatureCache.open_or_build(
        Path(cache).expanduser() / name, _PreparedPictures(examples, encoder),
        cache_key(encoder, examples.fingerprint), encoder, device=device, workers=workers,
    )  # fmt: skip
    return ExamplesWithFeatures(examples, built)
