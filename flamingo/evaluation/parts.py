"""An evaluation that was killed goes on where it stopped.

What this file teaches: the work is a list of named parts. Each finished part is kept in one small file of the run
folder, and a later call with the same arguments finds it there. The file goes when everything is done.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from flamingo import ranks
from flamingo.files import write_json

FILE = ".evaluation.partial.json"


class Parts:
    """Finished parts of an evaluation, by name.

    Args:
        folder: the run folder.
        arguments: everything the result depends on; if it is not what the kept parts were made with, they are dropped.
    """

    def __init__(self, folder: Path, arguments: dict):
        self.path, self.arguments = folder / FILE, json.loads(json.dumps(arguments))
        self.done = ranks.of_first(self._kept)  # of several processes the first reads and writes

    def _kept(self) -> dict:
        if not self.path.exists():
            return {}
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            same, done = kept["arguments"] == self.arguments, dict(kept["parts"])
        except (OSError, ValueError, KeyError, TypeError):
            print("the unfinished evaluation in this folder cannot be read: starting anew", file=sys.stderr)
            return {}
        if not same:
            print("an unfinished evaluation had other arguments or another model: starting anew", file=sys.stderr)
            return {}
        print(f"going on with an unfinished evaluation: {len(done)} parts are done", file=sys.stderr)
        return done

    def keep(self, name: str, work: Callable[[], object]):
        """The result of a part (anything JSON can hold): kept from before, or worked out now and kept."""
        if name not in self.done:
            # Through JSON and back, so that a part is the same whether it was kept or has just been worked out.
            self.done[name] = json.loads(json.dumps(work()))
            if ranks.is_first():
                write_json(self.path, {"arguments": self.arguments, "parts": self.done})
        return self.done[name]

    def finish(self) -> None:
        """Everything is written: forget the parts."""
        self.path.unlink(missing_ok=True)
