"""What the tabs are made of: the picture a visitor has chosen, how a scene is composed, and how things are shown.

What this file teaches: what a page shows need not be a file. Pictures go into the page as data (`picture_html`), so
nothing of a visitor's is left in a folder that another could read.
"""

import base64
import functools
import html
import inspect
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from PIL import Image

from flamingo.classroom import scenes
from flamingo.data.pictures import enlarged, open_picture
from flamingo.data.places import Unusable
from flamingo.errors import InputError

SURPRISES = 2**44  # numbers of scenes that no evaluation draws begin here
HOW_MANY = {"one": (1,), "count": (2, 3), "row": (2,), "column": (2,), "three": (3,)}  # things of each layout
TITLES = {"one": "one thing", "count": "several of one thing", "row": "side by side", "column": "one above the other",
          "three": "three side by side"}  # fmt: skip
CODE_TITLE = "The same in Python"


@dataclass(frozen=True, eq=False)
class Shown:
    """What a visitor is looking at: a picture, and its scene if it was composed here."""

    picture: Image.Image
    scene: scenes.Scene | None = None

    def __hash__(self) -> int:
        """By which Gradio sees that the picture has changed."""
        return hash(self.picture.tobytes())

    @property
    def note(self) -> str:
        """What training has seen of it."""
        return "" if self.scene is None else held_out_note(self.scene)


# ------------------------------------------------------------------------------------------------------- pictures
def surprise(split: str = "test", layout: str | None = None, rng: random.Random | None = None) -> Shown:
    """A scene of a split that training never showed."""
    number = SURPRISES + (rng or random).randrange(2**40)
    scene = scenes.make_scene(0, split, number, layout=layout)
    return Shown(scene.draw(), scene)


def compose(things: Sequence[str], layout: str, ground: str) -> Shown:
    """A scene of these things, in reading order; a single one stands for all of them. Raises InputError if they are
    too few or too many for the layout."""
    things, counts = list(things or ()), HOW_MANY[layout]
    if layout == "count" and len(set(things)) == 1:
        things = things * (random.choice(counts) if len(things) == 1 else 1)
    if len(things) not in counts or (layout == "count") != (len(things) > 1 and len(set(things)) == 1):
        wanted = "one kind of thing" if layout in ("one", "count") else f"{counts[0]} different things"
        raise InputError(f"{TITLES[layout]}: choose {wanted}, not {len(set(things))}")
    scene = scenes.composed(random.Random(), layout, tuple(things), ground)
    return Shown(scene.draw(), scene)


def opened(file: str | None) -> Shown | None:
    """An uploaded, pasted or photographed picture. Raises InputError for what is no picture, or too large."""
    if not file:
        return None
    try:
        return Shown(open_picture(Path(file)))
    except Unusable as error:
        raise InputError(f"the picture {error}") from None


def held_out_note(scene: scenes.Scene) -> str:
    """Has training seen these things, and together?"""
    names = sorted(set(scene.names))
    novel = [name for name in names if name in scenes.NOVEL_OBJECTS]
    if novel:
        return f"held out: training never showed {scenes.and_join([scenes.with_article(name) for name in novel])}"
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    apart = [f"{a} and {b}" for a, b in pairs if scenes.pair_split(a, b) != "train"]
    if apart:
        return f"held out: training never showed {scenes.and_join(apart)} together"
    return "these things may stand together in training scenes" if pairs else "training knows this thing"


def picture_file(**options) -> gr.Image:
    """An upload that is handed on as the file it is: we open it ourselves, within limits (data/pictures.py)."""
    file = gr.Image(sources=["upload", "clipboard", "webcam"], buttons=[], **options)
    file.preprocess = lambda payload: None if payload is None else payload.path  # Gradio's own decodes whatever comes
    return file


# ----------------------------------------------------------------------------------------------------- on the page
def sentences(function: Callable) -> Callable:
    """Let a tab's function end with a sentence on the page for what a visitor can mend."""

    def said(error: Exception) -> gr.Error:
        return gr.Error(html.escape(str(error)), duration=None, print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def guarded(*args):
            try:
                yield from function(*args)
            except ValueError as error:  # an InputError is one
                raise said(error) from error
    else:

        @functools.wraps(function)
        def guarded(*args):
            try:
                return function(*args)
            except ValueError as error:
                raise said(error) from error

    return guarded


def data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_html(picture: Image.Image, alt: str, width: int = 288, note: str = "") -> str:
    """A picture, not wider than its column, with a note below."""
    below = f'<div class="note">{html.escape(note)}</div>' if note else ""
    source = data_uri(enlarged(picture, max(width, 96)))
    return f'<img class="scene" style="width:{width}px" alt="{html.escape(alt)}" src="{source}">{below}'


def shown_html(shown: Shown, width: int = 288) -> str:
    return picture_html(shown.picture, "the picture", width, shown.note)


def code(lines: str) -> None:
    """The lines of Python that do the same as a tab, to copy into a notebook."""
    with gr.Accordion(CODE_TITLE, open=False):
        gr.Code(lines.strip(), language="python", interactive=False, show_label=False)


@dataclass(frozen=True)
class Composer:
    """The controls a scene is composed with."""

    things: gr.Dropdown
    layout: gr.Dropdown
    ground: gr.Dropdown

    @property
    def inputs(self) -> list:
        return [self.things, self.layout, self.ground]


def composer() -> Composer:
    marked = [(f"{name} (held out)" if name in scenes.NOVEL_OBJECTS else name, name) for name in sorted(scenes.OBJECTS)]
    things = gr.Dropdown(marked, value=["guitar", "tomato"], multiselect=True, max_choices=3, label="Things")
    with gr.Row():
        layout = gr.Dropdown([(TITLES[name], name) for name in scenes.LAYOUTS], value="row", label="Layout",
                             min_width=200)  # fmt: skip
        ground = gr.Dropdown(list(scenes.GROUNDS), value="blue", label="Ground", min_width=120)
    return Composer(things, layout, ground)


CSS = """
.scene { border-radius: 8px; max-width: 100%; image-rendering: auto; display: block; }
.note { opacity: .75; font-size: .85em; margin-top: .3em; }
.note, .note p { color: var(--body-text-color); }
.said { font-size: 1.25em; min-height: 1.6em; }
.steps { display: flex; gap: 8px; overflow-x: auto; padding-bottom: 6px; }
.step { flex: 0 0 132px; border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 6px 8px; }
.step b { display: block; font-family: var(--font-mono); white-space: nowrap; overflow: hidden; }
.bar { position: relative; font-family: var(--font-mono); font-size: .78em; margin-top: 3px; height: 1.5em; }
.bar i { position: absolute; inset: 0 auto 0 0; background: rgba(20, 150, 140, .28); border-radius: 3px; }
.bar span { position: absolute; left: 4px; white-space: nowrap; }
.bar em { position: absolute; right: 3px; font-style: normal; }
.mask { border-collapse: collapse; font-size: .85em; }
.mask td, .mask th { border: 1px solid var(--border-color-primary); padding: 1px 8px; text-align: center; }
.mask td:first-child { font-family: var(--font-mono); text-align: left; }
.mask .on { background: #1b7f79; color: white; } .mask img { width: 56px; border-radius: 4px; }
.scroll { max-height: 460px; overflow: auto; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; } .card { width: 132px; font-size: .85em; }
.figure { font-size: 1.5em; font-variant-numeric: tabular-nums; }
footer { display: none !important; }
"""
