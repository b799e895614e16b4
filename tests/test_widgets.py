"""Cells of notebooks that are widgets where a kernel runs, and still pictures elsewhere."""

import base64
import io
import sys

import pytest
from PIL import Image

from flamingo.classroom.scenes import make_scene
from flamingo.demo import widgets
from flamingo.demo.model import DemoModel
from flamingo.files import asset

SCENE = make_scene(0, "test", 3, layout="row")
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def demo():
    return DemoModel(asset("classroom/flamingo"), "cpu")


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: (the widget or None, the forms of the output)."""
    found = []
    monkeypatch.setattr(widgets, "display", lambda forms, raw: found.append(forms))
    return found


def children(widget) -> list:
    inner = [child for each in getattr(widget, "children", ()) for child in children(each)]
    return [widget, *inner]


@pytest.fixture
def made(monkeypatch):
    """The widgets that `show` is given."""
    found, real = [], widgets.show
    monkeypatch.setattr(widgets, "show", lambda widget, still: (found.append(widget), real(widget, still)))
    return found


def test_the_gate_sliders_move_caption_and_losses(demo, shown, made):
    ipywidgets = pytest.importorskip("ipywidgets", reason="needs requirements-demo.txt")
    widgets.gate_sliders(demo, SCENE)
    assert WIDGET in shown[0] and shown[0]["image/png"]
    parts = children(made[0])
    sliders = [part for part in parts if isinstance(part, ipywidgets.FloatSlider)]
    said = next(part for part in parts if type(part) is ipywidgets.HTML)
    assert len(sliders) == 4 and SCENE.caption("sentence") in said.value
    for slider in sliders:
        slider.value = 0
    assert SCENE.caption("sentence") not in said.value
    seeing, blind = said.value.rpartition("picture ")[2].split(", without ")
    assert seeing == blind
    assert demo.model.gates() == demo.about.trained


def test_the_attention_view_follows_word_layer_and_head(demo, shown, made):
    ipywidgets = pytest.importorskip("ipywidgets", reason="needs requirements-demo.txt")
    widgets.attention_view(demo, SCENE)
    parts = children(made[0])
    picture = next(part for part in parts if isinstance(part, ipywidgets.Image))
    word = next(part for part in parts if isinstance(part, ipywidgets.ToggleButtons))
    layer, head = (part for part in parts if isinstance(part, ipywidgets.Dropdown))
    seen = {bytes(picture.value)}
    for control, value in ((word, 0), (layer, 1), (head, 2)):
        control.value = value
        seen.add(bytes(picture.value))
    assert len(seen) == 4


@pytest.mark.parametrize("cell", [widgets.gate_sliders, widgets.attention_view])
def test_without_ipywidgets_there_is_the_still_picture(demo, shown, monkeypatch, cell):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    cell(demo, SCENE)
    assert set(shown[0]) == {"image/png", "text/plain"}
    with Image.open(io.BytesIO(base64.b64decode(shown[0]["image/png"]))) as still:
        assert still.width > 200 and len(set(still.convert("L").resize((20, 20)).tobytes())) > 20
