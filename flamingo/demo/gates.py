"""The tab *Gates*: close them, and see caption and loss become those of a model that is blind."""

import html

import gradio as gr

from flamingo.classroom import scenes
from flamingo.demo.answers import Gates
from flamingo.demo.parts import Shown, code, sentences, shown_html, surprise
from flamingo.demo.remote import RemoteModel

CODE = """
from flamingo import FlamingoModel
from flamingo.classroom.scenes import make_scene
from flamingo.evaluation.gates import gates_at

model = FlamingoModel.from_pretrained(RUN)
picture, prompt = make_scene(0, "test", 0).draw(), "<image> In a sentence:"
print(model.flamingo.gates())  # tanh of the attention and feed-forward gate of each layer
print(model.generate_captions(model.processor, images=[picture], prompt=prompt))
with gates_at(model.flamingo, [(0, 0)] * len(model.flamingo.gates())):  # all closed
    print(model.generate_captions(model.processor, images=[picture], prompt=prompt))
"""


def build(demo: RemoteModel, shown: gr.State, said: gr.State, tab: gr.Tab) -> None:
    trained = demo.about.trained
    if not trained:
        gr.Markdown("This model has no gates: its pictures stand among the text's own tokens.")
        return
    rounded = [round(value, 2) for pair in trained for value in pair]  # attention, feed-forward, attention, …
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            view = gr.HTML(elem_id="gated")
            surprising = gr.Button("Surprise me", variant="primary")
        with gr.Column(scale=2, min_width=300):
            sliders = []
            for layer, i in zip(demo.about.layers, range(0, len(rounded), 2), strict=True):
                with gr.Row():
                    for kind, value in zip(("attention", "feed-forward"), rounded[i : i + 2], strict=True):
                        label = f"layer {layer}, {kind}"
                        sliders.append(gr.Slider(-1, 1, value, step=0.01, label=label, min_width=160,
                                                 elem_classes="gate"))  # fmt: skip
            listed = ", ".join(f"{value:+.2f}" for value in rounded)
            gr.Markdown(f"tanh of each gate: at 0 the layer adds nothing. As trained: {listed}.", elem_classes="note")
            closing = gr.Button("Close all: the language model that was there before", size="md", elem_id="close")
            opening = gr.Button("As trained", size="md", elem_id="open")
            result = gr.HTML(elem_id="closed")
    code(CODE.replace("RUN", repr(str(demo.about.run))))

    def chosen(values: tuple[float, ...]) -> Gates:
        """Sliders → gates; where one stands as it was trained, the trained value itself, not its two digits."""
        exact = [None if value == at else value for value, at in zip(values, rounded, strict=True)]
        return list(zip(exact[::2], exact[1::2], strict=True))

    @sentences
    def show(now: Shown, before: tuple[str, str], *values: float):
        gates, prompt = chosen(values), before[0]
        caption = demo.caption(now.picture, prompt, gates)
        truth, whose = right_caption(now, prompt), "the right caption"
        if truth is None:
            truth, whose = demo.caption(now.picture, prompt) or "a picture", "the caption of the trained model"
        seeing, blind = demo.losses(now.picture, prompt, truth, gates)
        distance = None if any(values) else demo.distance_to_language_model(now.picture, prompt, truth, gates)
        return shown_html(now), result_html(caption, seeing, blind, truth, whose, distance)

    inputs = {"fn": show, "inputs": [shown, said, *sliders], "outputs": [view, result], "show_progress": "hidden"}
    gr.on([tab.select, *(slider.change for slider in sliders)], **inputs, trigger_mode="always_last")
    closing.click(lambda: [0.0] * len(sliders), None, sliders, show_progress="hidden")
    opening.click(lambda: rounded, None, sliders, show_progress="hidden")
    surprising.click(lambda before: (surprise(), (before[0], "")), said, [shown, said]).then(**inputs)


def right_caption(shown: Shown, prompt: str) -> str | None:
    """Of a scene, in the style that the prompt asks for; a sentence if it asks for none. None for other pictures."""
    if shown.scene is None:
        return None
    style = next((name for name, cue in scenes.CUES.items() if cue == prompt), "sentence")
    return shown.scene.caption(style)


def result_html(caption: str, seeing: float, blind: float, truth: str, whose: str, distance: float | None) -> str:
    """The caption, both losses, and, with all gates closed, whether this is the language model alone."""
    note = ""
    if distance is not None:
        note = (
            "All gates are closed: every logit equals the language model's own, bit for bit."
            if distance == 0
            else f"All gates are closed, but logits differ from the language model's own by up to {distance:.2g}."
        )
    return f"""<div class="said" id="gated-caption">{html.escape(caption) or "(nothing)"}</div>
<div class="cards" style="margin-top:.8em">
<div><div class="note">loss with the picture</div><div class="figure" id="seeing">{seeing:.3f}</div></div>
<div><div class="note">without the picture</div><div class="figure" id="blind">{blind:.3f}</div></div></div>
<div class="note">nats per token of {whose}: {html.escape(truth)}</div><div id="identity">{note}</div>"""
