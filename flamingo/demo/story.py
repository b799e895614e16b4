"""The tab *A run's story*: the curves of a run, its samples as they changed, its scores beside another run's."""

import html
from pathlib import Path

import gradio as gr
import pandas as pd
from PIL import Image

from flamingo.data.pictures import open_picture
from flamingo.demo.parts import code, picture_html, sentences
from flamingo.demo.remote import RemoteModel
from flamingo.errors import InputError
from flamingo.files import asset, read_json
from flamingo.run_folder import METRICS, read_metrics

CODE = """
import json
from pathlib import Path

run = Path(RUN)
entries = [json.loads(line) for line in (run / "metrics.jsonl").open()]
validations = [entry for entry in entries if "val_loss" in entry]
for entry in validations:
    print(entry["step"], entry["val_loss"], entry["val_loss_blind"], entry["attn"])  # attn: tanh of each gate
evaluation = json.loads((run / "evaluation.json").read_text())
print(evaluation["exact_match"], evaluation["exact_match_blind"], evaluation["verdict"])
"""
COMMITTED = asset("classroom/flamingo")
SCORES = {
    "exact_match": "exact match", "exact_match_blind": "… blind (no picture)",
    "exact_match_shuffled": "… shuffled (another's picture)", "exact_match_novel": "… novel objects",
    "attention_hit_rate": "attention peaks on the thing named",
}  # fmt: skip
POINTS = 400  # of a curve, at most


def title_of(run: Path) -> str:
    return "the committed classroom model" if run == COMMITTED else f"`{run}`"


def runs(own: Path) -> dict[str, str]:
    """Title → folder of every run that can be chosen: the page's own, the committed one, and those in runs/."""
    found = [own, COMMITTED, *sorted(Path("runs").glob("*/"))]
    return {title_of(run).strip("`"): str(run) for run in dict.fromkeys(found) if (run / METRICS).is_file()}


def curves(run: Path) -> tuple[pd.DataFrame, pd.DataFrame, list[dict]]:
    """Losses (step, loss, of), gates (step, gate, of), and the validations of a run. Raises InputError."""
    if not (run / METRICS).is_file():
        raise InputError(f"{run} is no run folder: it has no {METRICS}")
    entries = read_metrics(run / METRICS, 10**9)
    steps = [entry for entry in entries if "loss" in entry]
    validations = [entry for entry in entries if "val_loss" in entry]
    thinned = steps[:: max(1, len(steps) // POINTS)]
    losses = [(entry["step"], entry["loss"], "training") for entry in thinned]
    for name, title in {"val_loss": "validation", "val_loss_blind": "validation, picture taken away"}.items():
        losses += [(entry["step"], entry[name], title) for entry in validations]
    gates = [
        (entry["step"], value, f"{name} {i + 1}")
        for entry in validations
        for name in ("attn", "ff")
        for i, value in enumerate(entry[name])
    ]
    return pd.DataFrame(losses, columns=["step", "loss", "of"]), pd.DataFrame(gates, columns=["step", "gate", "of"]), (
        validations
    )  # fmt: skip


def samples_html(run: Path, validations: list[dict]) -> str:
    """The same pictures' captions at every validation, or samples.png if the run kept no others."""
    rows = []
    for entry in validations:
        kept = entry.get("samples")
        if isinstance(kept, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in kept):
            cells = "".join(f"<td>{html.escape(str(said))}</td>" for said, _ in kept)
            rows.append((f"<tr><td>{entry['step']}</td>{cells}</tr>", [str(true) for _, true in kept]))
    if rows:
        heads = "".join(f"<th>{html.escape(true)}</th>" for true in rows[-1][1])
        body = "".join(row for row, _ in rows)
        return f'<div class="scroll"><table class="mask"><tr><th>step \\ true</th>{heads}</tr>{body}</table></div>'
    for picture in (run / "samples.png", COMMITTED.parent.parent / "samples.png" if run == COMMITTED else None):
        if picture and picture.is_file():
            return picture_html(sample_picture(picture), "samples", 700)
    return '<div class="note">This run kept no samples.</div>'


def sample_picture(file: Path) -> Image.Image:
    """Raises InputError if it is damaged."""
    try:
        return open_picture(file)
    except ValueError as error:
        raise InputError(f"{file} {error}") from None


def scores(run: Path) -> dict[str, str]:
    """Title → score of a run's evaluation; empty if it has not been evaluated. Raises InputError for a damaged one."""
    if not (run / "evaluation.json").is_file():
        return {}
    held = read_json(run / "evaluation.json")
    found = {title: f"{held[name]:.3f}" for name, title in SCORES.items() if isinstance(held.get(name), float | int)}
    for name, entry in (held.get("metrics") or {}).items():
        if name not in SCORES and isinstance(entry, dict) and isinstance(entry.get("value"), float | int):
            found[name] = f"{entry['value']:.3f}" if entry["value"] < 100 else f"{entry['value']:.0f}"
    return found | ({"verdict": str(held["verdict"])} if "verdict" in held else {})


def build(demo: RemoteModel, tab: gr.Tab) -> None:
    with gr.Row():
        run = gr.Dropdown([], label="Run", allow_custom_value=True, elem_id="run")
        beside = gr.Dropdown([], label="Its scores beside those of", allow_custom_value=True)
    with gr.Row():
        losses = gr.LinePlot(x="step", y="loss", color="of", title="Loss, nats per token", height=280, min_width=300)
        gates = gr.LinePlot(
            x="step",
            y="gate",
            color="of",
            title="tanh(gate): attention, feed-forward",
            height=280,
            min_width=300,
        )
    gr.Markdown("**Samples** of its validation pictures")
    samples = gr.HTML(elem_id="samples")
    gr.Markdown("**Evaluation** (`python evaluate.py RUN` writes it)")
    table = gr.HTML(elem_id="scores")
    code(CODE.replace("RUN", repr(str(demo.about.run))))

    @sentences
    def tell(chosen: str, other: str):
        chosen, other = Path(chosen).expanduser(), Path(other).expanduser()
        loss, gate, validations = curves(chosen)
        return loss, gate, samples_html(chosen, validations), table_html({chosen: scores(chosen), other: scores(other)})

    def choices(chosen: str | None, other: str | None):
        found = runs(demo.about.run)
        last = list(found.values())[-1] if found else ""
        first = chosen or (str(demo.about.run) if str(demo.about.run) in found.values() else last)
        return gr.Dropdown(list(found.items()), value=first), gr.Dropdown(list(found.items()), value=other or last)

    told = {"fn": tell, "inputs": [run, beside], "outputs": [losses, gates, samples, table]}
    tab.select(choices, [run, beside], [run, beside], show_progress="hidden").then(**told)
    gr.on([run.input, beside.input], **told)


def table_html(found: dict[Path, dict[str, str]]) -> str:
    heads = "".join(f"<th>{html.escape(title_of(run).strip('`'))}</th>" for run in found)
    names = list(dict.fromkeys(name for each in found.values() for name in each))
    if not names:
        return '<div class="note">Neither has been evaluated.</div>'
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{html.escape(each.get(name, '–'))}</td>" for each in found.values())
        + "</tr>"
        for name in names
    )
    return f'<div class="scroll"><table class="mask"><tr><th></th>{heads}</tr>{rows}</table></div>'
