"""The gate sliders and the attention view of the page, as cells of a notebook.

What this file teaches: an output of a notebook may come in several forms, and whoever shows it takes the richest. So
each cell is a widget where a kernel runs and a still picture everywhere else: on GitHub, in a printout, or where
ipywidgets is not installed.
"""

import base64
import html
import io
import textwrap

from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from flamingo.classroom.scenes import CUES, Scene
from flamingo.demo.model import DemoModel
from flamingo.figures.heat_map import heat_map

PROMPT = CUES["sentence"]


def show(widget, still: bytes) -> None:
    """widget: None if there can be none. still: a PNG."""
    forms = {} if widget is None else dict(widget._repr_mimebundle_())
    forms |= {"image/png": base64.b64encode(still).decode(), "text/plain": "a picture; a widget where a kernel runs"}
    display(forms, raw=True)


def widgets_if_installed():
    """The module ipywidgets, or None."""
    try:
        import ipywidgets
    except ImportError:
        return None
    return ipywidgets


# ---------------------------------------------------------------------------------------------------------- gates
def gate_sliders(demo: DemoModel, scene: Scene) -> None:
    """A slider for each gate, tanh from -1 to 1; caption and losses follow. Still: as trained, and with all closed."""
    widgets = widgets_if_installed()
    closed = [(0.0, 0.0)] * len(demo.about.trained)
    still = gates_figure(
        {"as trained": gates_say(demo, scene, None), "all gates closed": gates_say(demo, scene, closed)}
    )
    if widgets is None:
        return show(None, still)
    sliders = [
        widgets.FloatSlider(value, min=-1, max=1, step=0.01, description=f"layer {layer} {kind}")
        for layer, pair in zip(demo.about.layers, demo.about.trained, strict=True)
        for kind, value in zip(("attn", "ff"), pair, strict=True)
    ]
    said = widgets.HTML()

    def update(*_) -> None:
        values = [slider.value for slider in sliders]
        caption, seeing, blind = gates_say(demo, scene, list(zip(values[::2], values[1::2], strict=True)))
        said.value = f"{html.escape(caption)}<br>loss with the picture {seeing:.3f}, without {blind:.3f}"

    for slider in sliders:
        slider.observe(update, "value")
    update()
    show(widgets.HBox([widgets.Image(value=png(scene.draw()), width=160), widgets.VBox([*sliders, said])]), still)


def gates_say(demo: DemoModel, scene: Scene, gates) -> tuple[str, float, float]:
    """The caption with these gates, and the loss of the right one with the picture and without."""
    picture = scene.draw()
    return demo.caption(picture, PROMPT, gates), *demo.losses(picture, PROMPT, scene.caption("sentence"), gates)


def gates_figure(found: dict[str, tuple[str, float, float]]) -> bytes:
    figure = Figure(figsize=(7, 1.3 * len(found)), layout="constrained")
    most = max(max(losses) for _, *losses in found.values())
    for axes, (title, (caption, *losses)) in zip(figure.subplots(len(found)), found.items(), strict=True):
        bars = axes.barh(["without", "with the picture"], losses[::-1], color=["#d1495b", "#1b7f79"])
        axes.bar_label(bars, fmt=" %.2f", fontsize=8)
        axes.set(xlim=(0, 1.15 * most), xticks=[])
        axes.set_title(f"{title}: {textwrap.shorten(caption, 72)}", fontsize=9, loc="left")
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return as_png(figure)


# ------------------------------------------------------------------------------------------------------ attention
def attention_view(demo: DemoModel, scene: Scene) -> None:
    """Choose a word, a layer and a head, and see its attention. Still: the words that name the scene's things."""
    widgets, picture = widgets_if_installed(), scene.draw()
    caption = demo.caption(picture, PROMPT)
    whole = demo.looks(picture, PROMPT, caption)
    named = [i for i, look in enumerate(whole) if look.word in scene.names] or [0]
    still = maps_figure({whole[i].word: heat_map(picture, whole[i], scene) for i in named})
    if widgets is None:
        return show(None, still)
    words = [(look.word, i) for i, look in enumerate(whole)]
    word = widgets.ToggleButtons(options=words, value=named[0], style={"button_width": "auto"})
    layers = [("all, by gate", None), *((f"before layer {n}", i) for i, n in enumerate(demo.about.layers))]
    heads = [("mean", None), *((str(i + 1), i) for i in range(demo.about.heads))]
    layer, head = widgets.Dropdown(options=layers), widgets.Dropdown(options=heads, description="head")
    shown = widgets.Image(width=240)

    def update(*_) -> None:
        look = demo.look(picture, PROMPT, caption, word.value, scene=scene, layer=layer.value, head=head.value)
        shown.value = png(look.picture)

    for control in (word, layer, head):
        control.observe(update, "value")
    update()
    show(widgets.HBox([shown, widgets.VBox([word, layer, head])]), still)


def maps_figure(maps: dict[str, Image.Image]) -> bytes:
    figure = Figure(figsize=(2.2 * len(maps), 2.5), layout="constrained")
    for axes, (word, lit) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        axes.imshow(lit)
        axes.set_title(word, fontsize=10)
        axes.axis("off")
    return as_png(figure)


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, facecolor="white")
    return buffer.getvalue()


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
