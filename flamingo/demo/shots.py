"""The tab *Few-shot*: examples on the left, a query on the right, and what the examples' pictures were worth."""

import html
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import gradio as gr

from flamingo.classroom import scenes
from flamingo.classroom.invented import invented_names
from flamingo.data.chunks import Chunk
from flamingo.demo.parts import Shown, code, opened, picture_file, picture_html, sentences, surprise
from flamingo.demo.remote import RemoteModel
from flamingo.errors import InputError

CODE = """
from flamingo import load_model
from flamingo.classroom.scenes import make_scene
from flamingo.data.chunks import Chunk
from flamingo.evaluation.captioning import continue_texts, encode_pictures
from flamingo.evaluation.few_shot import Query, prompt_text

model, processor, config = load_model(RUN)
shown = [make_scene(0, "test", i) for i in range(3)]
latents = encode_pictures(model, processor, [scene.draw() for scene in shown])  # (N, n, d)
examples = [Chunk(i, "", shown[i].caption("story")) for i in range(2)]
for way in ("", "text_only_demos", "shuffled_demos"):
    print(way, continue_texts(model, processor, latents, [prompt_text(Query(2, "", []), examples, way)]))
"""
MOST = 8  # examples
WAYS = {
    "": "with the examples",
    "text_only_demos": "without their pictures",
    "shuffled_demos": "with shuffled pictures",
}


@dataclass(frozen=True)
class Prompt:
    """Examples, each a picture, a prompt and what follows it; the query's picture and prompt, and its right answer if
    that is known."""

    examples: tuple[tuple[Shown, str, str], ...]
    query: Shown
    prompt: str = ""
    right: str = ""


# -------------------------------------------------------------------------------------------------- ready-made
def by_style(style: str, rng: random.Random) -> Prompt:
    """Two captions in a style that nothing else names."""
    shown = [surprise(rng=rng) for _ in range(3)]
    examples = tuple((one, "", one.scene.caption(style)) for one in shown[:2])
    return Prompt(examples, shown[2], right=shown[2].scene.caption(style))


def by_name(count: int, rng: random.Random) -> Prompt:
    """Things with invented names that no training has read; one of them again, drawn otherwise."""
    things = rng.sample(scenes.objects_of("test"), count)
    names = invented_names(rng, count, held_out=True)

    def alone(thing: str) -> Shown:
        scene = scenes.one_of(rng, thing)
        return Shown(scene.draw(), scene)

    right = rng.randrange(count)
    examples = tuple((alone(thing), "", name) for thing, name in zip(things, names, strict=True))
    return Prompt(examples, alone(things[right]), right=names[right])


def by_rule(rule: str, rng: random.Random) -> Prompt:
    """One word a picture, by a rule that only the examples show."""
    shown = [surprise(layout=rng.choice(scenes.RULE_LAYOUTS), rng=rng) for _ in range(5)]
    examples = tuple((one, scenes.ONE_WORD, one.scene.by_rule(rule)) for one in shown[:4])
    return Prompt(examples, shown[4], scenes.ONE_WORD, shown[4].scene.by_rule(rule))


READY: dict[str, Callable[[random.Random], Prompt]] = {
    "a style: stories": lambda rng: by_style("story", rng),
    "a style: telegrams": lambda rng: by_style("telegram", rng),
    "two invented names": lambda rng: by_name(2, rng),
    "five invented names": lambda rng: by_name(5, rng),
    "one word: the ground": lambda rng: by_rule("ground", rng),
    "one word: how many": lambda rng: by_rule("count", rng),
    "one word: the thing on the left": lambda rng: by_rule("left", rng),
}


# ------------------------------------------------------------------------------------------------------ the tab
def predictions(demo: RemoteModel, asked: Prompt) -> dict[str, str]:
    """What the model predicts for each of WAYS that differs from the first."""
    examples = [Chunk(i, prompt, text) for i, (_, prompt, text) in enumerate(asked.examples)]
    pictures = [shown.picture for shown, _, _ in asked.examples] + [asked.query.picture]
    ways = [way for way in WAYS if len(examples) > {"": -1, "text_only_demos": 0, "shuffled_demos": 1}[way]]
    said = demo.few_shot(pictures, examples, asked.prompt, ways)
    return dict(zip(ways, said, strict=True))


def examples_html(asked: Prompt) -> str:
    cards = [
        f'<div class="card">{picture_html(shown.picture, f"example {i + 1}", 120, f"{prompt} {text}".strip())}</div>'
        for i, (shown, prompt, text) in enumerate(asked.examples)
    ]
    return f'<div class="cards">{"".join(cards) or "no example yet"}</div>'


def result_html(said: dict[str, str], right: str) -> str:
    rows = []
    for way, text in said.items():
        mark = "" if not right else " ✓" if text == right else " ✗"
        rows.append(
            f'<div class="note">{WAYS[way]}</div><div class="said">{html.escape(text) or "(nothing)"}{mark}</div>'
        )
    if right:
        rows.append(f'<div class="note">right: {html.escape(right)}</div>')
    return "".join(rows)


def build(demo: RemoteModel, tab: gr.Tab) -> None:
    asked = gr.State(None)
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            ready = gr.Dropdown(list(READY), value="two invented names", label="Ready-made examples", elem_id="ready")
            again = gr.Button("Draw others", size="sm")
            examples = gr.HTML(elem_id="examples")
            with gr.Accordion("Add an example", open=True):
                text = gr.Textbox("", label="What follows its picture (empty: a scene's caption in the style below)",
                                  elem_id="example-text")  # fmt: skip
                style = gr.Dropdown(list(scenes.STYLES), value="telegram", label="Style", elem_id="example-style")
                file = picture_file(height=160,
                                   label="Its picture (none: a scene is drawn)")  # fmt: skip
                with gr.Row():
                    adding = gr.Button("Add the example", size="sm", elem_id="add-example")
                    clearing = gr.Button("Remove all examples", size="sm", elem_id="clear-examples")
        with gr.Column(scale=2, min_width=300):
            query = gr.HTML(elem_id="query")
            prompt = gr.Textbox("", label="Prompt after the query's picture (may be empty)")
            other = gr.Button("Another query", size="sm")
            with gr.Accordion("Your own query", open=False):
                own = picture_file(show_label=False, height=160)
            result = gr.HTML(elem_id="predictions")
    code(CODE.replace("RUN", repr(str(demo.about.run))))

    @sentences
    def predict(now: Prompt, words: str) -> str:
        now = replace(now, prompt=words.strip())
        return result_html(predictions(demo, now), now.right)

    @sentences
    def add(now: Prompt, text: str, style: str, file: str | None) -> tuple[Prompt, None]:
        if len(now.examples) >= MOST:
            raise InputError(f"{MOST} examples are enough here: remove them first")
        shown = opened(file) or surprise()
        text = text.strip() or (shown.scene.caption(style) if shown.scene else "")
        if not text:
            raise InputError("write what follows your picture: nobody else knows what is on it")
        return replace(now, examples=(*now.examples, (shown, "", text)), right=""), None

    @sentences
    def new_query(now: Prompt, file: str | None) -> Prompt:
        return replace(now, query=opened(file) or surprise(), right="")

    def draw(name: str) -> tuple[Prompt, str]:
        made = READY[name](random.Random())
        return made, made.prompt

    views = {"fn": lambda now: (examples_html(now), picture_html(now.query.picture, "the query", 200)),
             "inputs": asked, "outputs": [examples, query], "show_progress": "hidden"}  # fmt: skip
    said = {"fn": predict, "inputs": [asked, prompt], "outputs": result, "show_progress": "minimal"}
    begin = {"fn": draw, "inputs": ready, "outputs": [asked, prompt], "show_progress": "hidden"}
    tab.select(lambda now, name, words: (now, words) if now else draw(name), [asked, ready, prompt],
               [asked, prompt]).then(**views).then(**said)  # fmt: skip
    gr.on([ready.input, again.click], **begin).then(**views).then(**said)
    adding.click(add, [asked, text, style, file], [asked, file]).success(**views).then(**said)
    clearing.click(lambda now: (replace(now, examples=(), right=""), ""), asked, [asked, prompt]).then(**views).then(
        **said
    )
    other.click(lambda now: replace(now, query=surprise(), right=""), asked, asked).then(**views).then(**said)
    own.upload(new_query, [asked, own], asked).success(**views).then(**said)
    prompt.submit(**said)
