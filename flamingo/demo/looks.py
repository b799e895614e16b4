"""The tab *Where it looks*: the attention of each word of the caption on the picture, and the thing's true box."""

import gradio as gr
import torch

from flamingo.classroom import scenes
from flamingo.demo.model import DemoModel
from flamingo.demo.parts import Shown, code, picture_html, sentences, surprise
from flamingo.evaluation.attention import View, WordLook
from flamingo.figures.heat_map import SIDE, heat_map

CODE = """
from flamingo import load_model
from flamingo.classroom.scenes import make_scene
from flamingo.evaluation.attention import View, word_looks

model, processor, config = load_model(RUN)
scene = make_scene(0, "test", 0)
caption = scene.caption("sentence")
looks = word_looks(model, processor, [scene.draw()], ["In a sentence:"], [caption], view=View(layer=None, head=None))
for look in looks:
    print(look.word, tuple(look.grid.shape), "most at patch", look.grid.argmax().item())
"""
ALL = -1  # the choice of all layers, or of the mean over heads


def build(demo: DemoModel, shown: gr.State, said: gr.State, tab: gr.Tab) -> None:
    if not demo.can_show_attention:
        gr.Markdown("This model's pictures do not reach the text through a resampler and cross-attention: "
                    "there is no attention of that kind to show.")  # fmt: skip
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            view = gr.HTML(elem_id="heat")
            surprising = gr.Button("Surprise me", variant="primary")
        with gr.Column(scale=2, min_width=300):
            words = gr.Radio([], label="Click a word of the caption", elem_id="words")
            layers = [("all, by gate", ALL)] + [(f"before layer {layer}", i) for i, layer in enumerate(demo.layers)]
            with gr.Row():
                layer = gr.Dropdown(layers, value=ALL, label="Cross-attention", min_width=160)
                heads = [("mean of all", ALL)] + [(f"head {i + 1}", i) for i in range(demo.heads)]
                head = gr.Dropdown(heads, value=ALL, label="Head", min_width=120)
            boxes = gr.Checkbox(True, label="Show the true box of the thing that is named (classroom scenes)")
            gr.Markdown("Bright: where the model looked when it predicted the word, from its cross-attention back "
                        "through the resampler to the patches. It shows where it looked, not why it chose the word.",
                        elem_classes="note")  # fmt: skip
    code(CODE.replace("RUN", repr(str(demo.run))))

    looked = gr.State(None)  # picture, prompt and caption that the words and the heat map belong to

    @sentences
    def begin(now: Shown, before: tuple[str, str], layer: int, head: int, boxes: bool):
        prompt, caption = before
        caption = caption or demo.caption(now.picture, prompt)
        looks = demo.looks(now.picture, prompt, caption, view_of(layer, head))
        # Begin with the first word that names a thing: it shows most.
        names = [look.word in names_of(now) for look in looks]
        first = names.index(True) if True in names else 0 if looks else None
        choices = [(look.word, i) for i, look in enumerate(looks)]
        return gr.Radio(choices, value=first), look_html(now, looks, first, boxes), (now, prompt, caption)

    @sentences
    def choose(held: tuple[Shown, str, str], word: int | None, layer: int, head: int, boxes: bool) -> str:
        now, prompt, caption = held
        return look_html(now, demo.looks(now.picture, prompt, caption, view_of(layer, head)), word, boxes)

    controls = [layer, head, boxes]
    begins = {"fn": begin, "inputs": [shown, said, *controls], "outputs": [words, view, looked],
              "show_progress": "minimal"}  # fmt: skip
    tab.select(**begins)
    surprising.click(lambda before: (surprise(), (before[0], "")), said, [shown, said]).then(**begins)
    gr.on([words.input, layer.input, head.input, boxes.input], choose, [looked, words, *controls], view,
          show_progress="hidden", trigger_mode="always_last")  # fmt: skip


def view_of(layer: int, head: int) -> View:
    return View(None if layer == ALL else layer, None if head == ALL else head)


def names_of(shown: Shown) -> set[str]:
    if shown.scene is None:
        return set()
    return {form for name in shown.scene.names for form in (name, scenes.plural(name))}


def look_html(shown: Shown, looks: list[WordLook], word: int | None, boxes: bool) -> str:
    if word is None or word >= len(looks):
        blank = WordLook(0, "", torch.zeros(1, 1))
        return picture_html(heat_map(shown.picture, blank), "the picture", SIDE, "the caption has no word to look at")
    return picture_html(
        heat_map(shown.picture, looks[word], shown.scene if boxes else None), f"attention of {looks[word].word}", SIDE
    )
