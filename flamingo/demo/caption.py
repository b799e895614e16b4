"""The tab *Caption*: choose or compose a picture, and read the caption as it grows."""

import html
from collections.abc import Iterator

import gradio as gr

from flamingo.classroom import scenes
from flamingo.demo.answers import Step
from flamingo.demo.parts import (
    Shown,
    code,
    compose,
    composer,
    opened,
    picture_file,
    sentences,
    shown_html,
    surprise,
)
from flamingo.demo.remote import RemoteModel

CODE = """
from flamingo import FlamingoModel
from flamingo.classroom.scenes import make_scene

model = FlamingoModel.from_pretrained(RUN)
picture = make_scene(0, "test", 0).draw()  # or Image.open("yours.jpg")
inputs = model.processor(images=picture, text="<image> In a sentence:")
ids = model.generate(**inputs, max_new_tokens=32)  # num_beams=3, or do_sample=True, temperature=0.7, top_p=0.9
print(model.processor.decode(ids[0]))
logits = model(**inputs).logits[0, -1]  # the five likeliest first tokens
top = logits.softmax(-1).topk(5)
print(model.processor.tokenizer.convert_ids_to_tokens(top.indices.tolist()), top.values)
"""
CUES = [("no cue: its own guess", ""), *((cue, cue) for cue in scenes.CUES.values())]
WAYS = {"greedy": "the likeliest token each time", "beams": "several beginnings at once", "sampling": "drawn at random"}


def generation_options(way: str, beams: int, temperature: float, top_p: float, seed: int) -> dict:
    """What the controls mean to `generate`."""
    if way == "beams":
        return {"num_beams": int(beams)}
    if way == "sampling":
        return {"do_sample": True, "temperature": temperature, "top_p": top_p, "seed": int(seed)}
    return {}


def steps_html(steps: list[Step]) -> str:
    """A card for each token, with the likeliest five and their probabilities."""
    cards = []
    for step in steps:
        bars = "".join(
            f'<div class="bar"><i style="width:{100 * p:.1f}%"></i><span>{html.escape(token)}</span>'
            f"<em>{p:.2f}</em></div>"
            for token, p in step.likeliest
        )
        cards.append(f'<div class="step"><b>{html.escape(step.token)}</b>{bars}</div>')
    return f'<div class="steps">{"".join(cards)}</div>'


def said_html(caption: str, shown: Shown, prompt: str) -> str:
    """The caption, and for a scene whether it is the right one in the style asked for."""
    style = next((name for name, cue in scenes.CUES.items() if cue == prompt.strip()), None)
    note = ""
    if shown.scene and style:
        truth = shown.scene.caption(style)
        note = "exactly right" if caption == truth else f"right would be: {truth}"
    return f'<div class="said">{html.escape(caption)}</div><div class="note">{html.escape(note)}</div>'


def build(demo: RemoteModel, shown: gr.State, said: gr.State) -> None:
    """shown: the visitor's `Shown`. said: (prompt, caption) of it, which the other tabs go on with."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            view = gr.HTML(elem_id="picture")
            surprising = gr.Button("Surprise me", variant="primary")
            with gr.Accordion("Compose a scene", open=False):
                scene = composer()
                drawing = gr.Button("Draw it")
            with gr.Accordion("Your own picture", open=False):
                file = picture_file(show_label=False, height=220)
                gr.Markdown("The classroom's model knows nothing but classroom scenes.", elem_classes="note")
        with gr.Column(scale=2, min_width=300):
            with gr.Row():
                cue = gr.Dropdown(CUES, value=scenes.CUES["sentence"], label="Prompt (a style's cue, or your own text)",
                                  allow_custom_value=True, min_width=200)  # fmt: skip
                way = gr.Radio(list(WAYS), value="greedy", label="Decoding", min_width=200)
            with gr.Row(visible=False) as sampling:
                temperature = gr.Slider(0.1, 2.0, 0.7, step=0.1, label="Temperature", min_width=120)
                top_p = gr.Slider(0.1, 1.0, 1.0, step=0.05, label="Top p", min_width=120)
                seed = gr.Number(0, precision=0, minimum=0, label="Seed", min_width=80)
            beams = gr.Slider(2, 8, 3, step=1, label="Beams", visible=False)
            speaking = gr.Button("Caption", variant="primary")
            caption = gr.HTML('<div class="said"></div>', elem_id="caption")
            gr.Markdown("**At every step, the five likeliest tokens** (· is a space) and their probabilities:")
            steps = gr.HTML(elem_id="steps")
    code(CODE.replace("RUN", repr(str(demo.about.run))))

    @sentences
    def speak(now: Shown, prompt: str, *knobs) -> Iterator[tuple]:
        prompt, text = (prompt or "").strip(), ""
        for text in demo.stream(now.picture, prompt, **generation_options(*knobs)):
            yield said_html(text, Shown(now.picture), prompt), "", (prompt, text)
        steps = demo.steps(now.picture, prompt, text) if text else []
        yield said_html(text, now, prompt), steps_html(steps), (prompt, text)

    @sentences
    def take(file: str | None, before: Shown) -> Shown:
        return opened(file) or before

    knobs = [way, beams, temperature, top_p, seed]
    asked = {"fn": speak, "inputs": [shown, cue, *knobs], "outputs": [caption, steps, said]}
    gr.on([surprising.click], surprise, None, shown)
    gr.on([drawing.click], sentences(compose), scene.inputs, shown)
    file.change(take, [file, shown], shown)
    shown.change(shown_html, shown, view, show_progress="hidden").then(**asked)
    gr.on([speaking.click, cue.change], **asked, trigger_mode="always_last")
    way.change(lambda name: (gr.Row(visible=name == "sampling"), gr.Slider(visible=name == "beams")), way,
               [sampling, beams], show_progress="hidden")  # fmt: skip
