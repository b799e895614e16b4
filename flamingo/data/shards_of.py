"""Where a stream's examples come from: tar files, Parquet files or a hub, or a captioned set that is at hand.

What this file teaches: a stream is a list of *shards*, each read from its beginning to its end. All that is known of a
set beforehand is how many shards it has; what is in them is known when it comes by. A sample that cannot be used is
left out and counted. (The tar files are webdataset's: the files of a sample stand side by side and share the name up to
the first dot, 000017.jpg and 000017.txt; a sample of several pictures has 000017.0.jpg, 000017.1.jpg, …)
"""

import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlparse

from flamingo.data.batches import Example
from flamingo.data.captions import CaptionedPictures
from flamingo.data.columns import CAPTION_COLUMN, IMAGE_COLUMNS
from flamingo.data.interleaved import is_document, read_document
from flamingo.data.pictures import SUFFIXES, open_picture
from flamingo.data.places import Unusable, cause_of, shown
from flamingo.data.texts import parse_text, texts_of_row
from flamingo.errors import InputError

URLS = (
    "",
    "file",
    "http",
    "https",
    "hf",
    "gs",
    "sftp",
    "ftps",
    "scp",
)  # webdataset knows pipe: too, which is a command


def example_of(
    row: Mapping, pictures: list[bytes], beside: Mapping[str, bytes], captions: list[str], most: int
) -> Example:
    """A sample → an example of at most `most` captions. Raises Unusable."""
    if is_document(row):
        document = read_document(row, beside)
        return Example([open_picture(file) for file in document.pictures], [document.chunks])
    texts, _ = texts_of_row(row, captions)
    if not pictures:
        raise Unusable("there is no picture")
    if not texts:
        raise Unusable(f"there is no caption: it has {', '.join(map(shown, row)) or 'nothing else'}")
    chunks = [parse_text(text, len(pictures)) for text in texts[:most]]
    return Example([open_picture(file) for file in pictures], chunks)


class TarShards:
    """Tar files by a pattern: `shards/{00000..00099}.tar`, local or an address that webdataset can open."""

    def __init__(self, pattern: str, most: int):
        try:
            import webdataset
        except ImportError:
            raise InputError("tar files are read with webdataset: pip install webdataset -c constraints.txt") from None
        self.name, self.most, self.shards = pattern, most, webdataset.shardlists.expand_urls(pattern)
        if other := {urlparse(shard).scheme for shard in self.shards} - set(URLS):
            raise InputError(
                f"{shown(pattern)}: shards are read from files and by {', '.join(URLS[1:])}, not by {min(other)}"
            )
        missing = [shard for shard in self.shards[:1] if "://" not in shard and not Path(shard).is_file()]
        if missing:
            raise InputError(f"{shown(missing[0])}: no such file (a pattern is written shards/{{00000..00099}}.tar)")

    def samples(self, shard: int) -> Iterator[dict]:
        """{suffix: bytes} of each sample. (Processes and workers share out the shards themselves: see streams.py.)"""
        import webdataset

        options = {"shardshuffle": False, "nodesplitter": None, "workersplitter": None, "empty_check": False}
        return iter(webdataset.WebDataset([self.shards[shard]], **options))

    def example(self, sample: dict) -> Example:
        files = {name: value for name, value in sample.items() if isinstance(value, bytes)}
        pictures = sorted((name for name in files if f".{name.rpartition('.')[2]}" in SUFFIXES), key=_in_order)
        row: dict = {}
        try:
            row = json.loads(files["json"]) if "json" in files else {}
            if "txt" in files:
                row = {"caption": files["txt"].decode("utf-8")}
        except (ValueError, RecursionError):
            raise Unusable("its json or txt cannot be read") from None
        if not isinstance(row, dict):
            raise Unusable("its json holds no object")
        captions = [name for name in row if CAPTION_COLUMN.match(name)]
        return example_of(row, [files[name] for name in pictures], files, captions, self.most)


def _in_order(name: str) -> tuple:
    number = name.partition(".")[0]
    return (int(number) if number.isdecimal() else -1, name)


class TableShards:
    """The rows of Parquet files or of a set on the hub, through `datasets`, which reads them as they are asked for."""

    def __init__(self, source: str, most: int, image_column: str | None, caption_columns: str | None):
        import datasets

        path = Path(source).expanduser()
        files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path] if path.is_file() else []
        if path.exists() and not files:
            raise InputError(f"{shown(source)} holds no Parquet files: --stream reads those, a hub name, or tar files")
        found = ("parquet", {"data_files": list(map(str, files))}) if files else (source, {})
        try:
            self.rows = datasets.load_dataset(found[0], split="train", streaming=True, **found[1])
            first = next(iter(self._undecoded(self.rows)))
        except Exception as error:  # datasets raises many kinds, around each other
            raise InputError(f"cannot stream {shown(source)}: {cause_of(error) or 'it holds no rows'}") from error
        self.name, self.most = source, most
        self.shards = [f"{source}, part {i}" for i in range(self.rows.num_shards)]
        self.image_column = image_column or next(
            (c for name in IMAGE_COLUMNS for c in first if c.lower() == name), None
        )
        named = [name.strip() for name in (caption_columns or "").split(",") if name.strip()]
        self.captions = named or [c for c in first if CAPTION_COLUMN.match(c) and c != self.image_column]
        if not is_document(first) and (not {self.image_column, *self.captions} <= first.keys() or not self.captions):
            raise InputError(
                f"{shown(source)} has the columns {', '.join(map(shown, first))}: name those of pictures and captions "
                "with --image-column and --caption-columns"
            )

    def _undecoded(self, rows):
        """Pictures as files: decoding them is our own business (data/pictures.py)."""
        import datasets

        for column, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        return rows

    def samples(self, shard: int) -> Iterator[dict]:
        rows = self._undecoded(self.rows).shard(num_shards=len(self.shards), index=shard)
        # In "batches" of one: iter(rows) in a DataLoader's worker would share out once more what is this worker's own.
        return ({name: values[0] for name, values in row.items()} for row in rows.iter(batch_size=1))

    def example(self, row: dict) -> Example:
        value = row.get(self.image_column)
        pictures = value if isinstance(value, list) else [value]
        files = [picture.get("bytes") if isinstance(picture, dict) else picture for picture in pictures]
        return example_of(row, [file for file in files if isinstance(file, bytes)], {}, self.captions, self.most)


class SetShards:
    """A captioned set at hand, as a stream to be mixed with others: every so-manieth example is a shard."""

    PARTS = 256

    def __init__(self, examples: CaptionedPictures):
        self.examples, self.name = examples, examples.where
        self.order = random.Random(examples.fingerprint).sample(range(len(examples)), len(examples))
        self.shards = [f"{self.name}, part {i}" for i in range(min(self.PARTS, max(1, len(examples) // 2)))]

    def samples(self, shard: int) -> Iterator[int]:
        return iter(self.order[shard :: len(self.shards)])

    def example(self, index: int) -> Example:
        return self.examples[index]


# ---------------------------------------------------------------------------------------------- what --data names
WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")


def parts_of(data: str) -> list[tuple[str, float]]:
    """`a:0.7 + b:0.3` → [("a", 0.7), ("b", 0.3)]; anything else is one set of weight 1. Raises InputError if only some
    of several have a weight, or a weight is 0."""
    parts = data.split(" + ")
    matches = [WEIGHTED.fullmatch(part) for part in parts]
    if len(parts) == 1 and not (matches[0] and not Path(data).exists()):
        return [(data, 1.0)]
    if not all(matches):
        raise InputError("sets that are mixed need a weight each: --data a:0.7 --data b:0.3")
    found = [(match[1], float(match[2])) for match in matches]
    if not all(weight > 0 for _, weight in found):
        raise InputError("the weight of a set that is mixed must be greater than 0")
    return found


def is_tar(name: str) -> bool:
    return name.lower().partition("?")[0].endswith(".tar")


def some(samples: Iterator, count: int) -> list:
    return list(itertools.islice(samples, count))
