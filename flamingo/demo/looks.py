"""The tab *Where it looks*: the attention of each word of the caption on the picture, and the thing's true box."""

import gradio as gr

from flamingo.classroom import scenes
from flamingo.demo.answers import Look
from flamingo.demo.parts import Shown, code, picture_html, sentences, surprise
from flamingo.demo.remote import RemoteModel

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


def build(demo: RemoteModel, shown: gr.State, said: gr.State, tab: gr.Tab) -> None:
    if not demo.about.can_show_attention:
        gr.Markdown("This model's pictures do not reach the text through a resampler and cross-attention: "
                    "there is no attention of that kind to show.")  # fmt: skip
        return
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            view = gr.HTML(elem_id="heat")
            surprising = gr.Button("Surprise me", variant="primary")
        with gr.Column(scale=2, min_width=300):
            words = gr.Radio([], label="Click a word of the caption", elem_id="words")
            layers = [("all, by gate", ALL)] + [(f"before layer {n}", i) for i, n in enumerate(demo.about.layers)]
            with gr.Row():
                layer = gr.Dropdown(layers, value=ALL, label="Cross-attention", min_width=160)
                heads = [("mean of all", ALL)] + [(f"head {i + 1}", i) for i in range(demo.about.heads)]
                head = gr.Dropdown(heads, value=ALL, label="Head", min_width=120)
            boxes = gr.Checkbox(True, label="Show the true box of the thing that is named (classroom scenes)")
            gr.Markdown("Bright: where the model looked when it predicted the word, from its cross-attention back "
                        "through the resampler to the patches. It shows where it looked, not why it chose the word.",
                        elem_classes="note")  # fmt: skip
    code(CODE.replace("RUN", repr(str(demo.about.run))))

    looked = gr.State(None)  # picture, prompt and caption that the words and the heat map belong to

    def look(now: Shown, prompt: str, caption: str, word: int | None, layer: int, head: int, boxes: bool) -> Look:
        """Without a word: at the first that names a thing, for it shows most."""
        chosen = {"layer": None if layer == ALL else layer, "head": None if head == ALL else head}
        scene = now.scene if boxes else None
        return demo.look(now.picture, prompt, caption, word, names=names_of(now), scene=scene, **chosen)

    @sentences
    def begin(now: Shown, before: tuple[str, str], layer: int, head: int, boxes: bool):
        prompt, caption = before
        caption = caption or demo.caption(now.picture, prompt)
        found = look(now, prompt, caption, None, layer, head, boxes)
        choices = [(each, i) for i, each in enumerate(found.words)]
        return gr.Radio(choices, value=found.word), look_html(found), (now, prompt, caption)

    @sentences
    def choose(held: tuple[Shown, str, str], word: int | None, layer: int, head: int, boxes: bool) -> str:
        return look_html(look(*held, word, layer, head, boxes))

    controls = [layer, head, boxes]
    begins = {"fn": begin, "inputs": [shown, said, *controls], "outputs": [words, view, looked],
              "show_progress": "minimal"}  # fmt: skip
    tab.select(**begins)
    surprising.click(lambda before: (surprise(), (before[0], "")), said, [shown, said]).then(**begins)
    gr.on([words.input, layer.input, head.input, boxes.input], choose, [looked, words, *controls], view,
          show_progress="hidden", trigger_mode="always_last")  # fmt: skip


def names_of(shown: Shown) -> set[str]:
    if shown.scene is None:
        return set()
    return {form for name in shown.scene.names for form in (name, scenes.plural(name))}


def look_html(look: Look) -> str:
    width = max(look.picture.size)
    if look.word is None:
        return picture_html(look.picture, "the picture", width, "the caption has no word to look at")
    return picture_html(look.picture, f"attention of {look.words[look.word]}", width)
