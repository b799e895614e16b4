"""Which files a data set may name, and which files of a folder belong to it.

What this file teaches: a data set is a text that somebody else has written, and what it names is opened by us, with our
rights. So one rule, for every format, decides what may be opened at all (`Place.find`), one how much of it is read
(`read_regular`), and one which split a file is of: a folder's name says that, never a picture's.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flamingo.errors import InputError
from flamingo.files import one_line
from flamingo.run_folder import METRICS, RESUME_POINT, SUMMARY

MOST_BYTES = 512 * 2**20  # of a picture file
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


class Unusable(ValueError):
    """A picture that is left out; the message is the reason."""


def shown(name: object) -> str:
    """A name from somebody else's file as a message may hold it: short, and on one line."""
    text = str(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 80 else f"{text[:40]}…{text[-39:]}"


def cause_of(error: BaseException) -> str:
    """What lies at the bottom of a library's error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = one_line(error)
    return line if line.isprintable() else repr(line)


@dataclass(frozen=True)
class Place:
    """Where the files of a data set may be: below one of `roots`, which are resolved; or anywhere, if that is asked
    for."""

    roots: tuple[Path, ...]
    allow_outside: bool = False

    @classmethod
    def of(cls, *folders: Path, allow_outside: bool = False) -> "Place":
        return cls(tuple(folder.resolve() for folder in folders), allow_outside)

    def find(self, name: str, base: Path) -> Path:
        """The file that a data set names, counted from the folder `base`.

        Raises InputError for a URL, and for a file outside; symbolic links are followed first. Raises Unusable for what
        cannot be the name of a file.
        """
        if "://" in name:
            raise InputError(
                f"the data names {shown(name)}, and nothing is fetched from a network while training: download the "
                "pictures and name the files"
            )
        try:
            file = (base / name).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name with a NUL
            raise Unusable(f"cannot be found ({type(error).__name__})") from error
        if not self.allow_outside and not any(file.is_relative_to(root) for root in self.roots):
            raise InputError(
                f"the data names {shown(name)}, which is outside of its folder {shown(self.roots[0])}: move it there, "
                "or allow such files with --allow-outside"
            )
        return file


def read_regular(file: Path) -> bytes:
    """The whole of a regular file. Raises Unusable if it is none (a device has no end), is missing, or is too large."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("is no regular file")
        if status.st_size > MOST_BYTES:
            raise Unusable(f"is a file of {status.st_size / 1e6:.0f} MB, and {MOST_BYTES / 1e6:.0f} MB are the limit")
        return file.read_bytes()
    except FileNotFoundError:
        raise Unusable("is missing") from None
    except (OSError, ValueError) as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable(f"cannot be read ({type(error).__name__})") from error


def files_below(folder: Path) -> Iterator[Path]:
    """The regular files of a folder and of its sub-folders, in order of their names. Hidden ones and the folders of
    runs are left out: the figures of a run are no data."""
    folders = [folder]  # and no recursion: there are deeper folders than Python's stack
    while folders:
        entries = sorted(entry for entry in folders.pop().iterdir() if not entry.name.startswith("."))
        yield from (entry for entry in entries if entry.is_file())
        # A link to a folder may lead back up, and round and round.
        below = [e for e in entries if e.is_dir() and not e.is_symlink() and not _is_run(e)]
        folders += reversed(below)


def _is_run(folder: Path) -> bool:
    """Has train.py written this folder?"""
    has = lambda name: (folder / name).exists()  # noqa: E731
    return has(METRICS) and (has(RESUME_POINT) or has(SUMMARY))  # unfinished, or finished


def split_named_by(folders: tuple[str, ...]) -> str | None:
    """The split that the name of one of these folders stands for, None if there is none."""
    return next((SPLITS[name.lower()] for name in folders if name.lower() in SPLITS), None)
