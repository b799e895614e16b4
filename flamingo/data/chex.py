"""Chest X-rays with their reports in one file, the layout of flamingo-mini's medical fork.

What this file teaches: a study is several pictures and one text, which lie apart in such a file and meet by number.
The pictures may stand in one row of `images` or have a row each: those with the same `annotation_id` are of one study.
Each picture is an example with the text of its study; and what is held out of a set is held out by studies, or a model
would be tested on reports that it has read. (Two studies whose reports say the same, as those of healthy people do, are
two.)

    {"images": [{"id": 1, "file": ["front.png", "side.png"], "annotation_id": 7}, …],
     "annotations": [{"id": 7, "findings": "no pneumothorax"}, …]}

Both may also be objects by id, `file` may be one name, and the text may be called caption, findings, impression, report
or text.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from flamingo.data.places import shown
from flamingo.errors import InputError

TEXTS = ("caption", "findings", "impression", "report", "text")


class Chex:
    """Attributes, by the fork's names: dataset, what the file holds; imgs and anns, its images and annotations by id.
    notes: what could not be used, one line each; complete when `rows` is through."""

    def __init__(self, dataset: dict, name: str):
        self.dataset, self.name, self.notes = dataset, name, []
        self.imgs, self.anns = self._by_id("images"), self._by_id("annotations")

    def _by_id(self, part: str) -> dict[str, dict]:
        """Ids are compared as text: as the name of a field they are one. Raises InputError for another layout."""
        given = self.dataset[part]
        if isinstance(given, dict):
            pairs = list(given.items())
        elif isinstance(given, list) and all(isinstance(entry, dict) and "id" in entry for entry in given):
            pairs = [(entry["id"], entry) for entry in given]
        else:
            raise InputError(f"{self.name}: its {part} must be a list of objects with an id, or an object by id")
        found = {str(number): {"text": entry} if isinstance(entry, str) else entry for number, entry in pairs}
        if bad := next((number for number, entry in found.items() if not isinstance(entry, dict)), None):
            raise InputError(f"{self.name}: {shown(bad)} of its {part} is no object")
        if len(found) < len(pairs):
            raise InputError(f"{self.name}: two of its {part} have the same id")
        return found

    def rows(self) -> Iterator[tuple[str, dict]]:
        """(where, row) for each picture of a study with a text."""
        for number, image in self.imgs.items():
            files = image.get("file")
            files = [files] if isinstance(files, str) else files
            if not (isinstance(files, list) and files and all(isinstance(file, str) for file in files)):
                self.notes.append(f"image {shown(number)}: it names no file")
                continue
            annotation = self.anns.get(str(image.get("annotation_id")))
            if annotation is None:
                self.notes.append(f"{shown(files[0])}: its annotation {shown(image.get('annotation_id'))} is not there")
                continue
            text = next((annotation[name] for name in TEXTS if isinstance(annotation.get(name), str)), "")
            if not text.strip():
                self.notes.append(f"{shown(files[0])}: its annotation has no text ({', '.join(TEXTS)})")
                continue
            for file in files:
                # Its number, whatever file it is in: of several files of a folder each may hold pictures of one study.
                study = str(image["annotation_id"])
                yield f"{self.name}, image {number}", {"image": file, "caption": text, "study": study}


def read_chex(file: Path) -> Chex | None:
    """The file, if it has this layout; None if it is another table. Raises InputError for one that is damaged."""
    if file.suffix.lower() != ".json":
        return None
    try:
        with open(file, encoding="utf-8-sig") as text:
            if text.read(4096).lstrip()[:1] != "{":
                return None
            text.seek(0)
            dataset = json.load(text)
    except (OSError, ValueError, RecursionError):  # a row to a line, or what the reader of tables has a sentence for
        return None
    return Chex(dataset, shown(file)) if dataset.keys() >= {"images", "annotations"} else None
