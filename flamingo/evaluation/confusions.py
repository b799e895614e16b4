"""What is confused? Wrong captions of the classroom, sorted by what is wrong: objects, places, counts or articles.

What this file teaches: a score hides its causes. A model that takes the middle thing for the left one has the same
exact match as one that cannot tell a camel from a goat, and needs another remedy. Since every fact of a scene is known,
a caption can be read back into facts and compared: the things it names, in their order, and its number words.
"""

import re
from collections import Counter
from collections.abc import Sequence

from flamingo.classroom import scenes

KINDS = ("objects", "places", "counts", "articles")
SHOWN = 2  # of the commonest confusions of a kind
PLACES = {1: ("the thing",), 2: ("the first", "the second"), 3: ("the left", "the middle", "the right")}

_SINGULAR = {form: name for name in scenes.OBJECTS for form in (name, scenes.plural(name))}


def names_in(caption: str) -> list[str]:
    """The things a caption names, in its order, each in the singular."""
    return [_SINGULAR[word] for word in re.findall(r"[a-z]+", caption.lower()) if word in _SINGULAR]


def _numbers_in(caption: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", caption.lower()) if word in scenes.COUNTS]


def _count(caption: str) -> str:
    """Its number words, or how many things it names."""
    return " ".join(_numbers_in(caption)) or f"{len(names_in(caption))} named"


def confusions(drawn: Sequence[scenes.Scene], truths: Sequence[str], captions: Sequence[str]) -> dict[str, Counter]:
    """{"objects": Counter({"goat for camel": 3, …}), "places": …, "counts": …}, a wrong caption under each kind that
    it belongs to: a thing that is not in the picture; a thing of the picture in another's place; another number; "a"
    for "an", which has to be said before the name."""
    found = {kind: Counter() for kind in KINDS}
    for scene, truth, caption in zip(drawn, truths, captions, strict=True):
        right, named = names_in(truth), names_in(caption)
        if len(right) != len(named) or _numbers_in(truth) != _numbers_in(caption):
            found["counts"][f"{_count(caption)} for {_count(truth)}"] += 1
        else:
            for expected, name in zip(right, named, strict=True):
                if name not in scene.names:
                    found["objects"][f"{name} for {expected}"] += 1
                elif name != expected:
                    places = PLACES[len(scene.names)]
                    other, own = (places[scene.names.index(thing)] for thing in (name, expected))
                    found["places"][f"{other} for {own}"] += 1
            for article, name in re.findall(r"\b(an?) ([a-z]+)", caption.lower()):
                if name in right and scenes.with_article(name) != f"{article} {name}":
                    found["articles"][f"{article} {name}"] += 1
    return found


def confusion_table(found: dict[str, Counter]) -> str:
    """Four lines: of each kind how many, and the commonest."""
    lines = []
    for kind, counter in found.items():
        commonest = ", ".join(f"{what} ({count})" for what, count in counter.most_common(SHOWN))
        lines.append(f"  {kind:8}{sum(counter.values()):4} wrong{f': {commonest}' if commonest else ''}")
    return "\n".join(lines)
