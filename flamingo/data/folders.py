"""A hub name, a folder or a file → the splits of a data set, each with its rows and where its files are.

What this file teaches: the forms in which captioned sets lie on a disk. A folder has, in this order,

    metadata.jsonl (or .csv, .parquet)   a row for each picture, with its file_name; sub-folders may have their own
    pictures in class folders            cat/1.jpg, dog/1.jpg: the folder is the label
    tables and no pictures               train.jsonl, test-00000-of-00001.parquet: with names of pictures or their bytes
                                         (or train.json, test.json of the layout of chex.py, with pictures beside them)

and what is below a folder called train, validation or test is that split. A name that starts with train is a split only
for a table: crash test dummy.jpg is a picture like any other.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flamingo.data.chex import read_chex
from flamingo.data.pictures import SUFFIXES
from flamingo.data.places import SPLITS, Place, cause_of, files_below, shown, split_named_by
from flamingo.data.tables import TABLES, Columns, check_parquet, rows_of
from flamingo.errors import InputError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLE_OF_SPLIT = re.compile(rf"({'|'.join(SPLITS)})([-_.]\d.*)?", re.IGNORECASE)
HUB_NAME = re.compile(r"[\w-][\w.-]{,95}(/[\w-][\w.-]{,95})?")


@dataclass
class Split:
    """rows: a `datasets.Dataset`. bases: for each row the folder that its file names count from. files: what they were
    read from, in words. notes: what was left out."""

    rows: object
    bases: Sequence[Path]
    files: str
    notes: list[str] = field(default_factory=list)


def read_splits(source: str, allow_outside: bool = False) -> tuple[dict[str, Split], Place]:
    """The splits of a set by name, and where its files may be. Raises InputError when it cannot be found or read."""
    if not source.strip():
        raise InputError("the data has no name: --data is empty")
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):  # os.path has an answer for every name; that of Path may be an error
        place = Place.of(path, allow_outside=allow_outside)
        return _read_folder(path, place), place
    if os.path.isfile(path):
        if path.suffix.lower() not in TABLES:
            raise InputError(f"{shown(source)}: expected a folder or a file ending in {', '.join(TABLES)}")
        return {"train": _read_tables([path])}, Place.of(path.parent, allow_outside=allow_outside)
    if os.path.exists(path):
        raise InputError(f"{shown(source)} is neither a folder nor a regular file")
    if not HUB_NAME.fullmatch(source) or path.suffix.lower() in TABLES:
        raise InputError(f"{shown(source)}: no such file or folder")
    return _read_hub(source, allow_outside)


def _read_hub(name: str, allow_outside: bool) -> tuple[dict[str, Split], Place]:
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    place = Place.of(Path(datasets.config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE), allow_outside=allow_outside)
    splits = _load(name, f"{shown(name)} (a hub name needs a network; a folder must exist)")
    return {
        SPLITS.get(split, split): Split(rows, [place.roots[0]] * len(rows), f"the hub's {split}")
        for split, rows in splits.items()
    }, place


def _load(name: str, said: str, **files):
    """`datasets.load_dataset`. Raises InputError with the innermost cause of what it raises."""
    import datasets

    datasets.disable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    if files:  # what it has to say of a file is in its error too
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset(name, **files)
    except Exception as error:  # datasets raises many kinds, around each other
        raise InputError(f"cannot load the data {said}: {cause_of(error)}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


# -------------------------------------------------------------------------------------------------------- folders
def _read_folder(folder: Path, place: Place) -> dict[str, Split]:
    try:
        files = list(files_below(folder))
    except OSError as error:
        raise InputError(f"cannot read the data {shown(folder)}: {error.strerror}") from error
    if not files:
        raise InputError(f"{shown(folder)} is empty: put pictures and a metadata.jsonl there (see README)")
    metadata = [file for file in files if file.name.lower() in METADATA]
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    tables = [file for file in files if file.suffix.lower() in TABLES]
    for table in tables:
        place.find(table.name, table.parent)  # it may be a link that leads outside
    if len({file.parent for file in metadata}) < len(metadata):
        raise InputError(f"{shown(folder)} has a metadata.jsonl and another beside it: keep one of them")
    if metadata:
        return _with_metadata(folder, metadata, pictures)
    if pictures and not (tables and all(map(read_chex, tables))):
        return _class_folders(folder, pictures, tables)
    if not tables:
        raise InputError(f"{shown(folder)} holds neither pictures nor tables ({', '.join(TABLES)}): see README")
    by_split: dict[str, list[Path]] = {}
    for table in tables:
        named = TABLE_OF_SPLIT.fullmatch(table.stem)
        split = split_named_by(table.relative_to(folder).parts[:-1]) or (named and SPLITS[named[1].lower()])
        by_split.setdefault(split or "train", []).append(table)
    return {split: _read_tables(of_split) for split, of_split in by_split.items()}


def _with_metadata(folder: Path, metadata: list[Path], pictures: list[Path]) -> dict[str, Split]:
    columns: dict[str, Columns] = {}
    bases: dict[str, list[Path]] = {}
    files: dict[str, dict[str, None]] = {}  # of each split, in order and once
    named = set()
    for file in metadata:
        below = file.parent.relative_to(folder).parts
        for where, row in rows_of(file):
            names = _file_names(row)
            # Of the root's metadata, train/1.jpg is a training picture.
            folders = Path(names[0]).parts[:-1] if names else ()
            split = split_named_by((*below, *folders)) or "train"
            columns.setdefault(split, Columns()).add(_as_pictures(row), where)
            bases.setdefault(split, []).append(file.parent)
            files.setdefault(split, {})[file.relative_to(folder).as_posix()] = None
            named |= {os.path.normpath(file.parent / name) for name in names}
    if not columns:
        raise InputError(f"{shown(metadata[0])} holds no rows")
    splits = {
        split: Split(gathered.dataset(str(folder)), bases[split], _listed(files[split]))
        for split, gathered in columns.items()
    }
    unnamed = [file.relative_to(folder) for file in pictures if os.path.normpath(file) not in named]
    if named and unnamed:
        notes = next(iter(splits.values())).notes
        notes.append(f"{len(unnamed)} picture(s) that no metadata names, the first: {shown(unnamed[0])}")
    return splits


def _file_names(row: dict) -> list[str]:
    values = [row.get("file_name"), *(row.get("file_names") if isinstance(row.get("file_names"), list) else [])]
    return [value for value in values if isinstance(value, str) and "\0" not in value]


def _as_pictures(row: dict) -> dict:
    """file_name is called image, and file_names images, as `datasets` calls them."""
    renamed = {"file_name": "image", "file_names": "images"}
    return {name if renamed.get(name, name) in row else renamed.get(name, name): value for name, value in row.items()}


def _class_folders(folder: Path, pictures: list[Path], tables: list[Path]) -> dict[str, Split]:
    """Pictures without metadata: the folder of each is its label, if there are several and nothing lies beside them."""
    import datasets

    parents = {file.parent.relative_to(folder).parts for file in pictures}
    has_labels = all(parts and parts[-1].lower() not in SPLITS for parts in parents)
    labels = sorted({parts[-1] for parts in parents}) if has_labels else []
    features = {"image": datasets.Value("string")}
    if len(labels) > 1:
        features["label"] = datasets.ClassLabel(names=labels)
    elif tables:
        raise InputError(
            f"{shown(folder)} holds pictures and tables but no metadata.jsonl: name the table itself, --data "
            f"{shown(tables[0])}, or call it metadata{tables[0].suffix}"
        )
    _must_be_text(str(file.relative_to(folder)) for file in pictures)
    by_split: dict[str, list[Path]] = {}
    for file in pictures:
        by_split.setdefault(split_named_by(file.relative_to(folder).parts[:-1]) or "train", []).append(file)
    splits = {}
    for split, files in by_split.items():
        values = {"image": [str(file.relative_to(folder)) for file in files], "label": [f.parent.name for f in files]}
        rows = datasets.Dataset.from_dict({k: values[k] for k in features}, features=datasets.Features(features))
        splits[split] = Split(rows, [folder] * len(files), f"{len(files)} pictures without metadata")
    return splits


def _must_be_text(names: Iterable[str]) -> None:
    """Raises InputError for a name that the disk has in another encoding: no table can hold it."""
    for name in names:
        if any("\udc80" <= letter <= "\udcff" for letter in name):
            raise InputError(f"the data hold {shown(name)}, whose name is no text in UTF-8: rename it")


# --------------------------------------------------------------------------------------------------------- tables
def _read_tables(tables: list[Path]) -> Split:
    """The rows of one or several tables of a split."""
    if any(table.suffix.lower() == ".parquet" for table in tables):
        return _read_parquet(tables)
    columns, bases, notes = Columns(), [], []
    for table in tables:
        chex = read_chex(table)
        for where, row in chex.rows() if chex else rows_of(table):
            columns.add(row, where)
            bases.append(table.parent)
        notes += chex.notes if chex else []
    if notes and not bases:
        raise InputError(f"{shown(tables[0])}: no study can be used; the first: {notes[0]}")
    return Split(columns.dataset(str(tables[0])), bases, _listed(table.name for table in tables), notes)


def _read_parquet(tables: list[Path]) -> Split:
    """Through `datasets`, which keeps what is larger than the memory on the disk, and knows pictures and classes."""
    other = next((table for table in tables if table.suffix.lower() != ".parquet"), None)
    if other:
        raise InputError(f"{shown(other)} stands beside Parquet files of its split: a split is of one kind")
    first = None  # the columns of the first table
    for table in tables:
        if any(mark in str(table) for mark in "*?[]") or "::" in str(table) or "://" in str(table):
            raise InputError(f"{shown(table)}: a name with *, ?, [, ] or :: is a pattern to the reader: rename it")
        columns = check_parquet(table)
        first = columns if first is None else first
        if set(columns) != set(first):
            raise InputError(
                f"{shown(table)} has the columns {_listed(columns)}, but {shown(tables[0])} has {_listed(first)}: the "
                "tables of a split have the same"
            )
    rows = _load("parquet", shown(tables[0]), data_files={"train": [str(table) for table in tables]})["train"]
    return Split(rows, [tables[0].parent] * len(rows), _listed(table.name for table in tables))


def _listed(names) -> str:
    names = list(map(shown, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
