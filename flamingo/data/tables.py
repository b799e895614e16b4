"""A .jsonl, .json, .csv or .parquet file → rows, of which every fault has a line.

What this file teaches: check a file before a library sees it. What a library makes of a line it cannot use is an error
without a place, or a crash; what we make of it is a sentence with the file and the line. A table then has one kind of
value in each column, as the tables of `datasets` must.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from flamingo.data.places import cause_of, shown
from flamingo.errors import InputError

TABLES = (".jsonl", ".json", ".csv", ".parquet")
MOST_COLUMNS = 1000
LONGEST_LINE = 16 * 2**20  # characters
DEEPEST = 8  # lists and objects within each other
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?\Z")


def rows_of(file: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) for every row; where: "set.jsonl, line 7". Raises InputError for what is no row."""
    readers = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    try:
        yield from readers[file.suffix.lower()](file)
    except UnicodeDecodeError as error:
        raise InputError(f"{shown(file)} is no text in UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise InputError(f"cannot read {shown(file)}: {error.strerror or type(error).__name__}") from error


def _parsed(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg} at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; a list in a list in a list …
        raise InputError(f"{where} cannot be read ({cause_of(error)})") from None


def _object(row, where: str) -> tuple[str, dict]:
    if not isinstance(row, dict):
        raise InputError(f'{where} holds {_kind(row)}: a row is an object, {{"image": "a.jpg", "caption": "…"}}')
    return where, row


def _lines(file: Path) -> Iterator[tuple[str, dict]]:
    with open(file, encoding="utf-8-sig") as text:
        number = 0
        while line := text.readline(LONGEST_LINE):
            number += 1
            where = f"{shown(file)}, line {number}"
            if len(line) == LONGEST_LINE:
                raise InputError(f"{where} has more than {LONGEST_LINE:,} characters: is it one row to a line?")
            if line.strip():
                yield _object(_parsed(line, where), where)


def _json(file: Path) -> Iterator[tuple[str, dict]]:
    """A list of rows; or, as in a .jsonl, a row to a line."""
    with open(file, encoding="utf-8-sig") as text:
        if text.read(4096).lstrip()[:1] != "[":
            yield from _lines(file)
            return
        text.seek(0)
        rows = _parsed(text.read(), shown(file))
    for number, row in enumerate(rows, start=1):
        yield _object(row, f"{shown(file)}, row {number}")


def _csv(file: Path) -> Iterator[tuple[str, dict]]:
    """The first line names the columns; an empty field holds nothing, and a column of numbers holds numbers."""
    with open(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        rows = []
        try:
            for row in reader:
                rows.append((f"{shown(file)}, line {reader.line_num}", row))
        except csv.Error as error:
            raise InputError(f"{shown(file)}, line {reader.line_num}: {error}") from None
    rows = [(where, row) for where, row in rows if row]
    (where, names), *rows = rows or [("", [])]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None or "" in names:
        raise InputError(f"{where}: every column needs a name of its own, and {shown(double or '')!r} is none")
    for where, row in rows:
        if len(row) > len(names):
            raise InputError(
                f'{where} has {len(row)} fields for {len(names)} columns: text with commas needs "…" round it'
            )
    filled = lambda row, k: k < len(row) and row[k] != ""  # noqa: E731
    numeric = [all(NUMBER.match(row[k]) for _, row in rows if filled(row, k)) for k in range(len(names))]
    for where, row in rows:
        values = [(float(row[k]) if numeric[k] else row[k]) if filled(row, k) else None for k in range(len(names))]
        yield where, dict(zip(names, values, strict=True))


def _parquet(file: Path) -> Iterator[tuple[str, dict]]:
    check_parquet(file)
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
        for row in batch.to_pylist():
            number += 1
            yield f"{shown(file)}, row {number}", row


def check_parquet(file: Path) -> list[str]:
    """The names of its columns. Raises InputError for a file that is not in Parquet's form, is empty, or has two
    columns of one name."""
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.ParquetFile(file)
        names, rows = found.schema_arrow.names, found.metadata.num_rows
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise InputError(f"{shown(file)} is no Parquet file ({cause_of(error)})") from None
    if not rows or not names:
        raise InputError(f"{shown(file)} holds no rows")
    if double := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{shown(file)} has two columns of the name {shown(double)!r}: name one of them otherwise")
    return names


# ------------------------------------------------------------------------------------------------------- columns
def _kind(value) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "nothing" if value is None else kinds.get(type(value), f"a value of type {type(value).__name__}")


def _kinds(value, path: tuple[str, ...], where: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path, kind) of a value and of everything in it."""
    if value is None:
        return
    if len(path) > DEEPEST:
        raise InputError(f"{where}: {shown('.'.join(path[:2]))!r} holds more than {DEEPEST} things within each other")
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{where}: {shown('.'.join(path))!r} holds half of a character (a lone surrogate)")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"{where}: {shown('.'.join(path))!r} holds a number of more than 64 bits")
    yield path, _kind(value)
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _kinds(item, (*path, name), where)
    elif isinstance(value, list):
        for item in value:
            yield from _kinds(item, (*path, "[]"), where)


class Columns:
    """Rows, gathered column by column: what a row lacks is None, and every column holds values of one kind."""

    def __init__(self):
        self.values: dict[str, list] = {}
        self.rows = 0
        self._kinds: dict[tuple[str, ...], tuple[str, str]] = {}  # path → kind, and where it was first seen

    def add(self, row: dict, where: str) -> None:
        """Raises InputError if a value is of another kind than those before it."""
        for name, value in row.items():
            for path, kind in _kinds(value, (name,), where):
                known, first = self._kinds.setdefault(path, (kind, where))
                if kind != known:
                    column = shown(".".join(path))
                    raise InputError(f"{where}: {column!r} is {kind}, but {known} in {first}: a column holds one kind")
        for name in [name for name in row if name not in self.values]:
            self.values[name] = [None] * self.rows
        if len(self.values) > MOST_COLUMNS:
            raise InputError(f"{where}: more than {MOST_COLUMNS} columns")
        for name, column in self.values.items():
            column.append(row.get(name))
        self.rows += 1

    def dataset(self, source: str):
        """A `datasets.Dataset`. Raises InputError if there are no rows."""
        import datasets

        if not self.rows:
            raise InputError(f"{shown(source)} holds no rows")
        try:
            return datasets.Dataset.from_dict(self.values)
        except Exception as error:  # pyarrow raises many kinds; `add` has found those we know, with their line
            raise InputError(f"{shown(source)} cannot be made a table: {cause_of(error)}") from error
