"""The tab *Who sees what*: a text with several pictures, and the media mask it makes."""

import html
import random

import gradio as gr

from flamingo.data.chunks import EOC_TOKEN, MEDIA_TOKEN
from flamingo.data.pictures import enlarged
from flamingo.demo.answers import Seen
from flamingo.demo.parts import Shown, code, data_uri, opened, picture_file, picture_html, sentences, surprise
from flamingo.demo.remote import RemoteModel
from flamingo.errors import InputError

CODE = """
from flamingo import FlamingoModel, media_attention_mask
from flamingo.classroom.scenes import make_scene
import torch

model = FlamingoModel.from_pretrained(RUN)
pictures = [make_scene(0, "test", i).draw() for i in range(2)]
text = "once upon a time <image> a cat<|endofchunk|><image> In a sentence:"
inputs = model.processor(images=[pictures], text=[text])
mask = media_attention_mask(inputs["media_locations"], torch.arange(len(pictures))[None])
print(mask.mask[0].int())  # (T_txt, T_img): which token sees which picture
ids = model.generate(**inputs, max_new_tokens=32)
print(model.processor.decode(ids[0, inputs["input_ids"].shape[1]:]))
"""
MOST = 6  # pictures of a text


def began(rng: random.Random | None = None) -> tuple[list[Shown], str]:
    """Two pictures, a text before the first, a caption of the first, and the second to be captioned."""
    pictures = [surprise(layout=layout, rng=rng) for layout in ("one", "row")]
    first = pictures[0].scene.caption("list")
    return pictures, f"once upon a time {MEDIA_TOKEN} As a list: {first}{EOC_TOKEN}{MEDIA_TOKEN} As a list:"


def without_last(pictures: list[Shown], text: str) -> tuple[list[Shown], str]:
    """The last picture taken away, and its <image> too."""
    before, _, after = text.rpartition(MEDIA_TOKEN)
    return pictures[:-1], before + after.lstrip() if MEDIA_TOKEN in text else text


def mask_html(seen: Seen, pictures: list[Shown]) -> str:
    """A row for each token, a column for each picture."""
    heads = "".join(
        f'<th><img alt="picture {i + 1}" src="{data_uri(enlarged(shown.picture, 96))}"></th>'
        for i, shown in enumerate(pictures)
    )
    rows = []
    for token, row in zip(seen.tokens, seen.mask, strict=True):
        cells = "".join(f'<td class="{"on" if sees else ""}">{"sees" if sees else ""}</td>' for sees in row)
        rows.append(f"<tr><td>{html.escape(token)}</td>{cells}</tr>")
    return f'<div class="scroll"><table class="mask"><tr><th>token</th>{heads}</tr>{"".join(rows)}</table></div>'


def pictures_html(pictures: list[Shown]) -> str:
    cards = [f'<div class="card">{picture_html(shown.picture, f"picture {i + 1}", 110, f"{i + 1}")}</div>'
             for i, shown in enumerate(pictures)]  # fmt: skip
    return f'<div class="cards">{"".join(cards) or "no picture"}</div>'


def build(demo: RemoteModel, tab: gr.Tab) -> None:
    if not demo.about.has_media_mask:
        gr.Markdown("This model's pictures stand among the text's own tokens: the language model's own causal mask "
                    "says who sees what, and every later token sees every earlier picture.")  # fmt: skip
        return
    pictures = gr.State([])
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            view = gr.HTML(elem_id="pictures")
            with gr.Row():
                adding = gr.Button("Add a scene", size="sm", min_width=100)
                swapping = gr.Button("Swap them", size="sm", min_width=100)
                taking = gr.Button("Take the last away", size="sm", min_width=100)
            with gr.Accordion("Add your own picture", open=False):
                file = picture_file(show_label=False, height=200)
            text = gr.Textbox(lines=4, label=f"Text: {MEDIA_TOKEN} for each picture, {EOC_TOKEN} ends a caption",
                              elem_id="text")  # fmt: skip
            reading = gr.Button("Read it", variant="primary", elem_id="read")
        with gr.Column(scale=1, min_width=300):
            gr.Markdown("**The model goes on:**")
            said = gr.HTML('<div class="said"></div>', elem_id="continued")
            gr.Markdown("**Media mask.** A token sees the last picture before it; a text before the first sees none.")
            mask = gr.HTML(elem_id="mask")
    code(CODE.replace("RUN", repr(str(demo.about.run))))

    @sentences
    def read(shown: list[Shown], text: str):
        if not text.strip():
            raise InputError("write a text first")
        seen, continued = demo.who_sees_what(text, [each.picture for each in shown])
        return f'<div class="said">{html.escape(continued) or "(nothing)"}</div>', mask_html(seen, shown)

    @sentences
    def more(shown: list[Shown], text: str, new: Shown) -> tuple[list[Shown], str]:
        if len(shown) >= MOST:
            raise InputError(f"{MOST} pictures are enough here: take one away first")
        return [*shown, new], f"{text.rstrip()}{MEDIA_TOKEN}"

    @sentences
    def uploaded(file: str | None, shown: list[Shown], text: str):
        new = opened(file)
        return (*(more(shown, text, new) if new else (shown, text)), None)

    asked = {"fn": read, "inputs": [pictures, text], "outputs": [said, mask], "show_progress": "minimal"}
    render = {"fn": pictures_html, "inputs": pictures, "outputs": view, "show_progress": "hidden"}
    both = [pictures, text]
    tab.select(lambda shown, text: (shown, text) if shown else began(), both, both).then(**render).then(**asked)
    adding.click(lambda shown, text: more(shown, text, surprise()), both, both).success(**render).then(**asked)
    swapping.click(lambda shown: shown[::-1], pictures, pictures).then(**render).then(**asked)
    taking.click(without_last, both, both).then(**render).then(**asked)
    file.upload(uploaded, [file, *both], [*both, file]).success(**render).then(**asked)
    gr.on([reading.click, text.submit], **asked)
