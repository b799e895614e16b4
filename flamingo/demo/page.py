"""The page: its tabs, and what they share."""

import gradio as gr

from flamingo.classroom import scenes
from flamingo.demo import caption, gates, looks, sees, shots, story
from flamingo.demo.parts import surprise
from flamingo.demo.remote import RemoteModel


def page(demo: RemoteModel) -> gr.Blocks:
    """Everything a visitor sees. What one visitor chooses stays in the states of their session."""
    with gr.Blocks(title="Flamingo, hands on", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        shown = gr.State(None)  # the visitor's parts.Shown
        said = gr.State((scenes.CUES["sentence"], ""))  # prompt and caption of it
        gr.Markdown(f"# Flamingo, hands on\nA language model that looks at pictures: {story.title_of(demo.about.run)}")
        with gr.Tab("Caption"):
            caption.build(demo, shown, said)
        with gr.Tab("Where it looks") as tab:
            looks.build(demo, shown, said, tab)
        with gr.Tab("Gates") as tab:
            gates.build(demo, shown, said, tab)
        with gr.Tab("Who sees what") as tab:
            sees.build(demo, tab)
        with gr.Tab("Few-shot") as tab:
            shots.build(demo, tab)
        with gr.Tab("A run's story") as tab:
            story.build(demo, tab)
        blocks.load(surprise, None, shown)
    return blocks
