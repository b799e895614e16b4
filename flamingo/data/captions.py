"""Any captioned set: a hub name, a folder of pictures, parquet, jsonl or csv → examples.

What this file teaches: what "a captioned set" looks like on disk, and how little of it has to be spelled out. The
shortest form is a folder:

    pictures/metadata.jsonl      {"file_name": "beach.jpg", "caption": "a dog runs along the beach"}   (a line each)
    pictures/beach.jpg           several captions: "captions": ["…", "…"], or caption_0, caption_1, …

or sub-folders train/, validation/ and test/ of that form (all forms: folders.py). A text with <image> tags and a list
of pictures is an interleaved document. Pictures that cannot be read and captions that are no text are left out, counted
and listed.
"""

import copy
import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from flamingo.config import TrainingOptions
from flamingo.data.answer_columns import AnswerColumns, with_captions_from_labels
from flamingo.data.batches import Example
from flamingo.data.chunks import Chunk
from flamingo.data.columns import CAPTION_COLUMN, find_columns, with_pictures_undecoded
from flamingo.data.folders import Split, read_splits
from flamingo.data.pictures import open_picture, picture_bytes
from flamingo.data.places import Place, Unusable, shown
from flamingo.data.texts import parse_text, texts_of_row
from flamingo.errors import InputError

MOSTLY_BROKEN = 0.5  # a set of which more than this share cannot be used is an error
VALIDATION_SHARE = 0.05  # held out of the training split when the set brings no validation split


# --------------------------------------------------------------------------------------------------- the set
class CaptionedPictures(Dataset):
    """Examples of one split. Build with `load_captions`.

    Attributes:
        skipped: what was left out and why, one line each.
        source, name: of the set and of its split. files: what the split was read from, in words.
        numbered: (row, place in the row) of every usable picture, and fingerprint: a hash of their files. Both stay
            those of the whole set when a part is split off, so that the parts share one feature cache.
        without_caption: pictures that can be read but have no usable caption.
    """

    curriculum = ()  # all examples are equal

    def __init__(
        self, split: Split, place: Place, image_column: str, caption_columns: Sequence[str], source: str, name: str
    ):
        self.rows, self.bases, self.place, self.files = split.rows, split.bases, place, split.files
        self.image_column, self.caption_columns = image_column, tuple(caption_columns)
        self.source, self.name, self.where = source, name, f"{shown(source)} ({name})"
        self.skipped = list(split.notes)
        self.kept: list[int] = []  # the row of each example
        self.captions: list[slice] = []  # which of its row's texts are an example's
        self.lengths: list[int] = []
        self.numbered: list[tuple[int, int]] = []
        self.first_number: dict[int, int] = {}  # row → number of its first picture
        self.without_caption: list[str] = []
        self.shown: list[bytes] = []  # of each example its study, or else a hash of its pictures
        self._check_all()

    def files_of(self, row: dict) -> list:
        """Its pictures as the set holds them: names, bytes, or {"bytes", "path"}."""
        value = row[self.image_column]
        return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]

    def _texts(self, row: dict) -> tuple[list[list[Chunk]], list[str]]:
        """The texts of a row, and why others cannot be used."""
        captions, bad = texts_of_row(row, self.caption_columns)
        texts, faults = [], [f"{bad} caption(s) missing, empty or not text"] if bad else []
        for caption in captions:
            try:
                texts.append(parse_text(caption, len(self.files_of(row))))
            except Unusable as error:
                faults.append(str(error))
        return texts, faults

    def _check_all(self) -> None:
        """Read everything once: better a minute now than a broken file after an hour."""
        digest = hashlib.sha256()
        for i in tqdm(range(len(self.rows)), desc=f"checking {self.where}", disable=len(self.rows) < 200, leave=False):
            row = self.rows[i]
            pictures = self.files_of(row)
            name = next(filter(None, map(_name, pictures)), f"row {i + 1}")
            try:
                hashes = [self._check(picture, i) for picture in pictures]
                if not hashes:
                    raise Unusable("there is no picture")
            except Unusable as error:
                self.skipped.append(f"{name}: {error}")
                continue
            texts, faults = self._texts(row)
            self.skipped += [f"{name}: {fault}" for fault in faults]
            if texts:
                self.kept.append(i)
                self.captions.append(slice(0, len(texts)))
                self.lengths.append(max(sum(len(chunk.prompt + chunk.caption) for chunk in text) for text in texts))
                self.first_number[i] = len(self.numbered)
                self.numbered += [(i, k) for k in range(len(pictures))]
                self.shown.append(repr(row["study"]).encode() if row.get("study") else b"".join(hashes))
                digest.update(b"".join(hashes))
            else:
                self.without_caption.append(name)
        self.fingerprint = digest.hexdigest()[:16]
        if len(self.kept) < (1 - MOSTLY_BROKEN) * len(self.rows) or not self.kept:
            why = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise InputError(
                f"{self.where}: only {len(self.kept)} of {len(self.rows)} examples can be used{why}. "
                "Mend the set, or name its columns with --image-column and --caption-columns"
            )

    def _check(self, picture, row: int) -> bytes:
        """The hash of a picture's file. Raises Unusable if it cannot be read."""
        file = picture_bytes(picture, self.bases[row], self.place)
        open_picture(file, thumbnail=True)
        return hashlib.sha256(file).digest()

    def split_off(self, share: float, seed: int) -> tuple["CaptionedPictures", "CaptionedPictures"]:
        """Two sets, the second with `share` of the pictures, at least two if that leaves as many. What shows the same
        pictures stays together, as where each caption has a row, and what is of one study (unless all is: then by
        examples). Raises InputError if there is but one example."""
        if len(self) < 2:
            raise InputError(f"{self.where} has {len(self)} usable example: training needs at least 2")
        same = {shown: number for number, shown in enumerate(dict.fromkeys(self.shown))}
        group = [same[shown] for shown in self.shown] if len(same) > 1 else range(len(self))
        count = max(group) + 1
        held_out = max(2 if count >= 4 else 1, round(share * count))
        chosen = set(random.Random(f"split {seed}").sample(range(count), held_out))
        large = self._with_examples([(i, self.captions[i]) for i in range(len(self)) if group[i] not in chosen])
        small = self._with_examples([(i, self.captions[i]) for i in range(len(self)) if group[i] in chosen])
        small.files, small.skipped = f"held out of {self.name}", []  # listed once, with the larger part
        return large, small

    def with_few_captions(self, most: int) -> "CaptionedPictures":
        """The same texts, at most `most` to an example: a picture with more of them becomes several examples. So what
        a step needs is bounded, however often a picture was captioned."""
        return self._with_examples(
            [
                (i, slice(first, min(first + most, captions.stop)))
                for i, captions in enumerate(self.captions)
                for first in range(captions.start, captions.stop, most)
            ]
        )

    def _with_examples(self, examples: list[tuple[int, slice]]) -> "CaptionedPictures":
        """A set of some of these examples, each with some of its texts."""
        part = copy.copy(self)
        part.kept = [self.kept[i] for i, _ in examples]
        part.lengths = [self.lengths[i] for i, _ in examples]
        part.shown = [self.shown[i] for i, _ in examples]
        part.captions = [captions for _, captions in examples]
        return part

    def __len__(self) -> int:
        return len(self.kept)

    def length(self, index: int) -> int:
        """Characters of the longest text."""
        return self.lengths[index]

    def __getitem__(self, index: int) -> Example:
        base = self.bases[self.kept[index]]
        pictures = [self._open(picture, base) for picture in self.files_of(self.row(index))]
        return Example(pictures, self.texts(index))

    def _open(self, picture, base) -> Image.Image:
        """Raises InputError if a picture that could be read at the beginning no longer can."""
        try:
            return open_picture(picture_bytes(picture, base, self.place))
        except Unusable as error:
            name = _name(picture) or self.where
            raise InputError(f"{name}: {error}, and could be read when the run began") from error

    def row(self, index: int) -> dict:
        """All that the set holds about an example, by column; pictures undecoded."""
        return self.rows[self.kept[index]]

    def texts(self, index: int) -> list[list[Chunk]]:
        """The texts of an example, without its pictures."""
        return self._texts(self.row(index))[0][self.captions[index]]

    def numbers(self, index: int) -> slice:
        """Which of the numbered pictures are an example's."""
        row = self.kept[index]
        first = self.first_number[row]
        return slice(first, first + len(self.files_of(self.rows[row])))

    def picture(self, number: int) -> Image.Image:
        """A numbered picture."""
        row, place = self.numbered[number]
        return self._open(self.files_of(self.rows[row])[place], self.bases[row])


def _name(picture) -> str | None:
    """The name of a picture, if it has one."""
    name = picture.get("path") if isinstance(picture, dict) else picture
    return shown(name.replace("\\", "/").rpartition("/")[2]) if isinstance(name, str) and name else None


# ------------------------------------------------------------------------------------------------- loading
def load_captions(
    source: str | Path, *, image_column: str | None = None, caption_columns: str | None = None, seed: int = 0,
    answer_columns: AnswerColumns | None = None, allow_outside: bool = False,
) -> dict[str, CaptionedPictures]:  # fmt: skip
    """Every split of a captioned set, by name; there is always a `train` and a `validation`.

    A set without validation split lends some of its training pictures, the same ones for the same seed.
    answer_columns: given for an evaluation, where the class names of labelled pictures may stand for captions.
    allow_outside: files outside of the set's own folder may be named. Raises InputError when the set cannot be found,
    its columns cannot be found, it names files that must not be read, or most of it is broken.
    """
    if not isinstance(source, (str, Path)):
        raise InputError(f"a data set is named by a text or a path, not by {source!r:.60}")
    source = str(source)
    splits, place = read_splits(source, allow_outside)
    if "train" not in splits:
        splits["train"] = replace(next(iter(splits.values())))
    has_captions = caption_columns or any(map(CAPTION_COLUMN.match, splits["train"].rows.column_names))
    if answer_columns is not None and not has_captions:
        for split in splits.values():
            split.rows = with_captions_from_labels(split.rows, source, answer_columns)
    image_column, columns = find_columns(splits["train"].rows, source, image_column, caption_columns)
    sets = {}
    for name, split in sorted(splits.items(), key=lambda item: item[0] != "train"):  # the others as they come
        absent = [column for column in (image_column, *columns) if column not in split.rows.column_names]
        if absent:
            raise InputError(f"{shown(source)}: its {name} split has no column {shown(absent[0])!r}, but train has")
        split.rows = with_pictures_undecoded(split.rows, image_column, source)
        sets[name] = CaptionedPictures(split, place, image_column, columns, source, name)
    if "validation" not in sets:
        sets["train"], sets["validation"] = sets["train"].split_off(VALIDATION_SHARE, seed)
    return sets


def describe_splits(sets: dict[str, CaptionedPictures]) -> str:
    """Which files are used as which split, in one line."""
    parts = [f"{name} {len(examples)} examples ({examples.files})" for name, examples in sets.items()]
    return f"{shown(next(iter(sets.values())).source)}: {', '.join(parts)}"


def load_set(options: TrainingOptions, answer_columns: AnswerColumns | None = None) -> dict[str, CaptionedPictures]:
    """The set that a run was started with, wherever it is called from; see `load_captions`."""
    if options.stream or " + " in options.data or options.data.endswith(".tar"):
        raise InputError(
            f"{shown(options.data)} is a stream, which is only trained on: name a captioned set with --data"
        )
    there = options.data_place is not None and os.path.exists(options.data_place)
    return load_captions(
        options.data_place if there else options.data, image_column=options.image_column,
        caption_columns=options.caption_columns, seed=options.seed, answer_columns=answer_columns,
        allow_outside=options.allow_outside,
    )  # fmt: skip
