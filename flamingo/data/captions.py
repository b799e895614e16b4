"""Any captioned set: a hub name, a folder of pictures, parquet, jsonl or csv → examples.

What this file teaches: what "a captioned set" looks like on disk, and how little of it has to be spelled out. The
shortest form is a folder:

    pictures/metadata.jsonl      {"file_name": "beach.jpg", "caption": "a dog runs along the beach"}   (a line each)
    pictures/beach.jpg           several captions: "captions": ["…", "…"], or caption_0, caption_1, …

or sub-folders train/, validation/ and test/ of that form. A text with <image> tags and a list of pictures is an
interleaved document. Pictures that cannot be read and captions that are no text are left out, counted and listed.
"""

import copy
import hashlib
import io
import random
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from flamingo.data.answer_columns import AnswerColumns, with_captions_from_labels
from flamingo.data.batches import Example
from flamingo.data.preprocess import to_rgb
from flamingo.data.processor import EOC_TOKEN, MEDIA_TOKEN, Chunk
from flamingo.errors import InputError

FILE_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
IMAGE_COLUMNS = ("image", "images", "picture", "pictures", "img", "jpg", "png", "file_name", "filename", "image_path")
CAPTION_COLUMN = re.compile(r"^(captions?|texts?|sentences?|descriptions?)(_?\d+)?$", re.IGNORECASE)
MOSTLY_BROKEN = 0.5  # a set of which more than this share cannot be used is an error
VALIDATION_SHARE = 0.05  # held out of the training split when the set brings no validation split


# ------------------------------------------------------------------------------------------------- pictures
def picture_file(value: dict) -> bytes:
    """The file itself of what `datasets` holds of an undecoded picture ({"bytes", "path"})."""
    return value["bytes"] if value.get("bytes") else Path(value["path"]).read_bytes()


def open_picture(value: dict, *, thumbnail: bool = False) -> Image.Image:
    """The same → RGB.

    thumbnail: only prove that it can be read; a JPEG is then decoded at an eighth of its size.
    """
    with Image.open(io.BytesIO(picture_file(value))) as picture:
        if thumbnail:
            picture.draft("RGB", (picture.width // 8, picture.height // 8))
            picture.load()
            return picture
        return to_rgb(picture)


# ---------------------------------------------------------------------------------------------------- texts
def parse_interleaved(text: str) -> list[Chunk]:
    """`<image>a cat<|endofchunk|> and <image>a dog<|endofchunk|>` → chunks; text outside a caption is a prompt."""
    before, *parts = text.split(MEDIA_TOKEN)
    chunks = [Chunk(None, before.strip())] if before.strip() else []
    for picture, part in enumerate(parts):
        caption, _, after = part.partition(EOC_TOKEN)
        chunks.append(Chunk(picture, "", caption.strip()))
        if after.strip():
            chunks.append(Chunk(None, after.strip()))
    return chunks


def _texts_of_row(row: dict, columns: Sequence[str]) -> tuple[list[str], int]:
    """The usable captions of a row, and how many were not: missing, empty, or no text."""
    values = [row[column] for column in columns]
    values = [item for value in values for item in (value if isinstance(value, (list, tuple)) else [value])]
    good = [" ".join(value.split()) for value in values if isinstance(value, str) and value.strip()]
    return good, len(values) - len(good)


# --------------------------------------------------------------------------------------------------- the set
class CaptionedPictures(Dataset):
    """Examples of one split. Build with `load_captions`.

    Attributes:
        skipped: what was left out and why, one line each.
        numbered: (row, place in the row) of every usable picture, and fingerprint: a hash of their files. Both stay
            those of the whole set when a part is split off, so that the parts share one feature cache.
        without_caption: pictures that can be read but have no usable caption.
    """

    curriculum = ()  # all examples are equal

    def __init__(self, rows, image_column: str, caption_columns: Sequence[str], source: str, split: str):
        self.rows, self.image_column, self.caption_columns = rows, image_column, tuple(caption_columns)
        self.source, self.where, self.skipped, self.kept, self.lengths = source, f"{source} ({split})", [], [], []
        self.numbered: list[tuple[int, int]] = []
        self.first_number: dict[int, int] = {}  # row → number of its first picture
        self.without_caption: list[str] = []
        self._check_all()

    def _pictures(self, row: dict) -> list[dict]:
        value = row[self.image_column]
        return list(value) if isinstance(value, (list, tuple)) else [value]

    def _check_all(self) -> None:
        """Read everything once: better a minute now than a broken file after an hour."""
        digest = hashlib.sha256()
        for i in tqdm(range(len(self.rows)), desc=f"checking {self.where}", disable=len(self.rows) < 200, leave=False):
            row = self.rows[i]
            pictures = self._pictures(row)
            name = next((Path(p["path"]).name for p in pictures if isinstance(p, dict) and p.get("path")), f"row {i}")
            texts, bad = _texts_of_row(row, self.caption_columns)
            self.skipped += [f"{name}: {bad} caption(s) missing, empty or not text"] if bad else []
            try:
                files = [picture_file(picture) for picture in pictures]
                for file in files:
                    open_picture({"bytes": file}, thumbnail=True)
            except Exception as error:  # Pillow raises many kinds for a broken file
                self.skipped.append(f"{name}: cannot be read as a picture ({type(error).__name__})")
                continue
            wrong = [text for text in texts if MEDIA_TOKEN in text and text.count(MEDIA_TOKEN) != len(pictures)]
            if wrong:
                self.skipped.append(
                    f"{name}: {wrong[0].count(MEDIA_TOKEN)} {MEDIA_TOKEN} tags for {len(pictures)} pictures"
                )
                texts = [text for text in texts if text not in wrong]
            if texts:
                self.kept.append(i)
                self.lengths.append(max(map(len, texts)))
                self.first_number[i] = len(self.numbered)
                self.numbered += [(i, k) for k in range(len(pictures))]
                for file in files:
                    digest.update(hashlib.sha256(file).digest())
            else:
                self.without_caption.append(name)
        self.fingerprint = digest.hexdigest()[:16]
        if len(self.kept) < (1 - MOSTLY_BROKEN) * len(self.rows) or not self.kept:
            why = f"; the first: {self.skipped[0]}" if self.skipped else ""
            raise InputError(
                f"{self.where}: only {len(self.kept)} of {len(self.rows)} examples can be used{why}. "
                "Mend the set, or name its columns with --image-column and --caption-columns"
            )

    def split_off(self, share: float, seed: int) -> tuple["CaptionedPictures", "CaptionedPictures"]:
        """Two sets, the second with `share` of the examples, at least two if that leaves as many. Raises InputError if
        there is but one example."""
        if len(self) < 2:
            raise InputError(f"{self.where} has {len(self)} usable example: training needs at least 2")
        held_out = max(2 if len(self) >= 4 else 1, round(share * len(self)))
        chosen = set(random.Random(f"split {seed}").sample(range(len(self)), held_out))
        large, small = copy.copy(self), copy.copy(self)
        for part, belongs in ((large, lambda i: i not in chosen), (small, lambda i: i in chosen)):
            part.kept = [row for i, row in enumerate(self.kept) if belongs(i)]
            part.lengths = [length for i, length in enumerate(self.lengths) if belongs(i)]
        small.skipped = []  # listed once, with the larger part
        return large, small

    def __len__(self) -> int:
        return len(self.kept)

    def length(self, index: int) -> int:
        """Characters of the longest text."""
        return self.lengths[index]

    def __getitem__(self, index: int) -> Example:
        pictures = [open_picture(picture) for picture in self._pictures(self.row(index))]
        return Example(pictures, self.texts(index))

    def row(self, index: int) -> dict:
        """All that the set holds about an example, by column; pictures undecoded."""
        return self.rows[self.kept[index]]

    def texts(self, index: int) -> list[list[Chunk]]:
        """The texts of an example, without its pictures."""
        row = self.row(index)
        texts = []
        for text in _texts_of_row(row, self.caption_columns)[0]:
            if MEDIA_TOKEN not in text:
                texts.append([Chunk(0, "", text)])
            elif text.count(MEDIA_TOKEN) == len(self._pictures(row)):
                texts.append(parse_interleaved(text))
        return texts

    def numbers(self, index: int) -> slice:
        """Which of the numbered pictures are an example's."""
        row = self.kept[index]
        first = self.first_number[row]
        return slice(first, first + len(self._pictures(self.rows[row])))

    def picture(self, number: int) -> Image.Image:
        """A numbered picture."""
        row, place = self.numbered[number]
        return open_picture(self._pictures(self.rows[row])[place])


# ------------------------------------------------------------------------------------------------- loading
def _read(source: str):
    """A `datasets.DatasetDict` from a hub name, a folder or a file."""
    import datasets

    path = Path(source)
    datasets.disable_progress_bars()
    try:
        if path.is_file():
            if path.suffix not in FILE_LOADERS:
                raise InputError(f"{source}: expected a folder or a file ending in {', '.join(FILE_LOADERS)}")
            return datasets.load_dataset(FILE_LOADERS[path.suffix], data_files={"train": str(path)}), path.parent
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            if not files:
                raise InputError(f"{source} is empty: put pictures and a metadata.jsonl there (see README)")
            tables = [file for file in files if file.suffix in FILE_LOADERS and not file.name.startswith("metadata.")]
            pictures = [file for file in files if file.suffix.lower() in Image.registered_extensions()]
            if tables and not pictures:
                return datasets.load_dataset(str(path)), path
            return datasets.load_dataset("imagefolder", data_dir=str(path)), path
        if path.is_absolute() or source.startswith(".") or source.count("/") > 1 or path.suffix in FILE_LOADERS:
            raise InputError(f"{source}: no such file or folder")
        return datasets.load_dataset(source), path
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "" if path.exists() else " (a hub name needs a network; a folder must exist)"
        raise InputError(f"cannot load the data {source}{hint}: {reason}") from error


def _find_columns(split, source: str, image_column: str | None, caption_columns: str | None) -> tuple[str, list[str]]:
    import datasets

    have = list(split.column_names)
    wanted = [name.strip() for name in (caption_columns or "").split(",") if name.strip()]
    for name in [image_column, *wanted]:
        if name and name not in have:
            raise InputError(f"{source} has no column {name!r}: it has {', '.join(have)}")
    if image_column is None:
        typed = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
        named = [column for name in IMAGE_COLUMNS for column in have if column.lower() == name]
        image_column = next(iter(typed + named), None)
        if image_column is None:
            raise InputError(f"{source}: none of {', '.join(have)} looks like pictures: name it with --image-column")
    wanted = wanted or [name for name in have if CAPTION_COLUMN.match(name) and name != image_column]
    if not wanted:
        raise InputError(f"{source}: none of {', '.join(have)} looks like captions: name them with --caption-columns")
    return image_column, wanted


def _as_undecoded_pictures(split, column: str, folder: Path):
    """Let the picture column hold {"bytes", "path"}; columns of paths become pictures, relative to the file."""
    import datasets

    feature = split.features[column]
    inner = getattr(feature, "feature", feature)
    is_list = inner is not feature
    if isinstance(inner, datasets.Value):
        absolute = lambda name: str(folder / name) if isinstance(name, str) else name  # noqa: E731
        convert = (lambda names: [absolute(n) for n in names]) if is_list else absolute
        split = split.map(lambda row: {column: convert(row[column])}, load_from_cache_file=False)
    target = datasets.Image(decode=False)
    return split.cast_column(column, datasets.List(target) if is_list else target)


def load_captions(
    source: str, *, image_column: str | None = None, caption_columns: str | None = None, seed: int = 0,
    answer_columns: AnswerColumns | None = None,
) -> dict[str, CaptionedPictures]:  # fmt: skip
    """Every split of a captioned set, by name; there is always a `train` and a `validation`.

    A set without validation split lends some of its training pictures, the same ones for the same seed.
    answer_columns: given for an evaluation, where the class names of labelled pictures may stand for captions. Raises
    InputError when the set cannot be found, its columns cannot be found, or most of it is broken.
    """
    data, folder = _read(source)
    splits = {("validation" if name in ("val", "valid", "dev") else name): split for name, split in data.items()}
    if "train" not in splits:
        splits["train"] = next(iter(splits.values()))
    has_captions = caption_columns or any(map(CAPTION_COLUMN.match, splits["train"].column_names))
    if answer_columns is not None and not has_captions:
        splits = {name: with_captions_from_labels(split, source, answer_columns) for name, split in splits.items()}
    image_column, columns = _find_columns(splits["train"], source, image_column, caption_columns)
    sets = {}
    for name, split in splits.items():
        rows = _as_undecoded_pictures(split, image_column, folder)
        sets[name] = CaptionedPictures(rows, image_column, columns, source, name)
    if "validation" not in sets:
        sets["train"], sets["validation"] = sets["train"].split_off(VALIDATION_SHARE, seed)
    return sets
