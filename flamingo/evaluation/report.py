"""evaluation.json and the pictures → one page that can be mailed: report.html.

What this file teaches: a page needs neither a server nor a script. Pictures stand in it as data, and the gallery's
filter is three radio buttons: CSS shows what follows the one that is checked.
"""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from flamingo.classroom import scenes
from flamingo.evaluation.answer_tasks import answers_sentence
from flamingo.evaluation.few_shot import few_shot_columns
from flamingo.evaluation.gates import gates_sentence
from flamingo.evaluation.single_objects import binding_sentence
from flamingo.evaluation.test_set import EvaluationSet
from flamingo.figures import evaluation_figures as figures
from flamingo.figures.run_figures import CLOSE
from flamingo.files import write_atomically

FILE = "report.html"
GALLERY = 24  # pictures of each kind
THUMBNAIL = 160  # pixels, the longer side of a larger picture
EXTREMES = 4  # best and worst examples

STYLE = """
:root { color-scheme: light dark; --back: #fdfdfb; --text: #1d2126; --quiet: #6a7078; --line: #d9dadd; --card: #fff;
  --right: #1b7f79; --wrong: #c23b4e; }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --text: #e7e8ea; --quiet: #9aa1aa; --line: #343a42;
  --card: #1e2329; --right: #5cc4bc; --wrong: #f08292; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 64rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { border-left: 4px solid var(--wrong); padding: .3rem .9rem; font-size: 1.05rem; }
.verdict.looks { border-color: var(--right); }
.quiet, figcaption { color: var(--quiet); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.own { font-weight: 600; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding: .3rem .35rem; } }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem;
  margin-top: 1.2rem; }
figure { margin: 0; } figure img { max-width: 100%; background: #fff; border-radius: 6px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-top: 4px solid var(--wrong); border-radius: 6px;
  padding: .5rem; font-size: .82rem; line-height: 1.35; }
.card.right { border-top-color: var(--right); }
.card.graded { border-top-color: color-mix(in oklab, var(--right) var(--grade), var(--line)); }
.card img { width: 100%; border-radius: 4px; display: block; margin-bottom: .4rem; }
.card p { margin: .15rem 0; } .card .true { color: var(--quiet); }
.filter { position: absolute; opacity: 0; }
label { display: inline-block; border: 1px solid var(--line); border-radius: 1rem; padding: .25rem .9rem;
  cursor: pointer; margin: 0 .3rem .9rem 0; }
.filter:focus-visible + label { outline: 2px solid var(--right); }
.filter:checked + label { background: var(--text); color: var(--back); }
#only-right:checked ~ .cards .wrong, #only-wrong:checked ~ .cards .right { display: none; }
summary { cursor: pointer; }
"""


def write_report(folder: Path, test_set: EvaluationSet, result: dict) -> None:
    """Write report.html into the run folder. result: what evaluation.json holds."""
    page = report_page(folder.resolve().name, test_set, result)
    write_atomically(folder / FILE, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def report_page(name: str, test_set: EvaluationSet, result: dict) -> str:
    """The page, complete: nothing is loaded from elsewhere, nothing is run."""
    sections = [
        f"<h1>Does {escape(name)} look at the picture?</h1>",
        f'<p class="verdict{" looks" if result["looks"] else ""}">{escape(result["verdict"])}</p>',
        f'<p class="quiet">{result["n"]} pictures of {escape(result["data"])}, split {escape(result["split"])}; '
        f"examined in {result['seconds']:.0f} s. Intervals are 95 %, over pictures.</p>",
        "<h2>Scores beside their controls</h2>", _scores(result), _by_objects(result),
        '<div class="figures">', _figure(figures.controls_figure(result, "exact_match", "exact match"),
            "Exact match: the caption is the right one, word for word."),
        _figure(figures.controls_figure(result, "cider_d", "CIDEr-D"), "CIDEr-D: partly right counts too."), "</div>",
        _few_shot(result),
        _attention(test_set, result),
        "<h2>Best and worst</h2>", _best_and_worst(test_set, result),
        "<h2>Gallery</h2>", _gallery(test_set, result),
        "<h2>The run</h2>", _pairs("Cost", result["cost"]), _pairs("Training options", result["options"]),
        _pairs("Model", result["config"]), _pairs("Seconds of this evaluation", result["seconds_by_part"]),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: evaluation</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )


# ------------------------------------------------------------------------------------------------------- pieces
def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _figure(png: bytes | None, caption: str) -> str:
    if png is None:
        return ""
    text = escape(caption)
    return f'<figure><img src="{_data(png)}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The second column is the score itself."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td{' class=own' if i == 1 else ''}>{escape(c)}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _number(value) -> str:
    return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _scores(result: dict) -> str:
    head = ["", "score", "interval", *(name.replace("_", " ") for name in result["controls"])]
    rows = []
    for name, score in result["metrics"].items():
        interval = "" if score["low"] is None else f"{score['low']:.3f} – {score['high']:.3f}"
        others = [_number(control[name]["value"]) for control in result["controls"].values()]
        rows.append([name.replace("_", " "), _number(score["value"]), interval, *others])
    scales: dict[str, list[str]] = {}
    for name, score in result["metrics"].items():
        scales.setdefault(score["scale"], []).append(name.replace("_", " "))
    scale = "; ".join(f"{', '.join(names)}: {text}" for text, names in scales.items())
    return _table(head, rows) + (
        f'<p class="quiet">Scales. {escape(scale)}.</p>'
        '<p class="quiet">Controls. Blind: the picture taken away. Shuffled: another’s picture. Constant: one '
        "caption for all. Copy demo: the caption of a picture drawn from the examples. Nearest: the caption of the "
        "training picture that looks most alike; typical: of the captions of the five nearest the one most like the "
        "others; consensus, where it is given: the training caption of which a regression from pictures to captions "
        "expects most. What lies above all of them was read off the picture.</p>"
    )


def _by_objects(result: dict) -> str:
    rows = []
    for name in ("exact_match", "exact_match_blind", "exact_match_shuffled"):
        cells = [result[name], *(group[name] for group in result["by_objects"].values())]
        rows.append([name.replace("_", " "), *map(_number, cells)])
    if result.get("novel"):
        novel = [result["novel"]["by_objects"].get(group, {}).get("exact_match") for group in result["by_objects"]]
        rows.append(["exact match, novel objects", *map(_number, [result["exact_match_novel"], *novel])])
    groups = [f"{group} (n = {held['n']})" for group, held in result["by_objects"].items()]
    what = "drawn things" if "novel" in result else "pictures of an item"
    return f"<h2>By number of {what}</h2>" + _table(["", "all", *groups], rows)


def _few_shot(result: dict) -> str:
    if not result["shots"]:
        return ""
    way = result["few_shot"]
    columns = few_shot_columns(result)
    rows = [
        [k, *(f"{table[k][score]:.3f} ± {table[k][score + '_spread']:.3f}" for _, table, score in columns)]
        for k in result["shots"]
    ]
    chosen = "at random" if way["demos"] == "random" else "the most similar (RICES)"
    zero = "no example" if way["zero_shot"] == "bare" else "two examples without pictures"
    text = (
        f"Examples: {chosen}, from {way['support']} pictures of the training split; ± is the spread over "
        f"{way['trials']} draws. 0 shots: {zero}. Template: {way['template'] or 'none'}. " + answers_sentence(result)
    )
    if "exact_match_style_given" in result:
        text += (
            f" With the style named by its cue and no example: {result['exact_match_style_given']:.3f} (novel objects "
            f"{result['exact_match_novel_style_given']:.3f}). {binding_sentence(result['fast_binding']).capitalize()}."
        )
        if "closed_gates" in result:
            text += f" {gates_sentence(result['closed_gates']).capitalize()}."
    drawn = [
        (figures.few_shot_figure(result), "Captions against the number of examples."),
        (figures.tasks_figure(result), "Answers against the number of examples."),
        (figures.one_word_figure(result), "One word by a rule that only the examples' pictures show."),
        (figures.binding_figure(result), "Fast binding: examples name things, the last picture shows one of them."),
        (figures.gates_figure(result), "What each layer's look is worth: its attention gate closed."),
    ]
    shown = "".join(_figure(picture, caption) for picture, caption in drawn)
    head = ["shots", *(title.replace("_", " ") for title, _, _ in columns)]
    return f'<h2>Few-shot</h2><p>{escape(text)}</p>{_table(head, rows)}<div class="figures">{shown}</div>'


def _attention(test_set: EvaluationSet, result: dict) -> str:
    held, shown = result["attention"], []
    for i in sorted({look["item"] for look in held["examples"]}):
        item = test_set.items[i]
        words = [(look["word"], look["grid"]) for look in held["examples"] if look["item"] == i]
        boxes: dict[str, list] = {}
        for placed in item.scene.objects if item.scene else ():
            for form in {placed.name, scenes.plural(placed.name)}:
                boxes.setdefault(form, []).append(placed.box)
        caption = result["examples"][i]["said"]
        picture = figures.attention_figure(_thumbnail(item.picture, 320), words, boxes)
        shown.append(_figure(picture, f"It says: {caption}"))
    if not shown:
        return ""
    text = "Where it looked as it said a word: cross-attention times the resampler’s attention, back on the patches."
    if result["attention_hit_rate"] is not None:
        text += (
            f" The peak is on the thing named (framed) for {result['attention_hit_rate']:.3f} of {held['n']} names; a "
            f"peak put anywhere would be for {held['chance']:.3f}."
        )
    return f'<h2>Attention</h2><p>{text}</p><div class="figures">{"".join(shown)}</div>'


def _thumbnail(picture: Image.Image, side: int = THUMBNAIL) -> Image.Image:
    small = picture.convert("RGB")  # a copy
    small.thumbnail((side, side))
    return small


def _card(test_set: EvaluationSet, result: dict, i: int, good: bool) -> str:
    """Right or wrong where one caption is right; elsewhere a shade for how close it is to what people wrote."""
    example = result["examples"][i]
    prompt = f'<p class="true">{escape(example["prompt"])}</p>' if example["prompt"] else ""
    true = "" if example["right"] else f'<p class="true">true: {escape(example["true"])}</p>'
    kind = "right" if good else "wrong"
    if not test_set.classroom:
        true += f'<p class="true">CIDEr-D {example["score"]:.2f}</p>'
        kind += f' graded" style="--grade: {100 * min(1, example["score"] / CLOSE):.0f}%'
    picture = _data(figures.png(_thumbnail(test_set.items[i].picture)))
    return (
        f'<div class="card {kind}"><img src="{picture}" alt="" loading="lazy">{prompt}'
        f"<p>{escape(example['said'] or '(nothing)')}</p>{true}</div>"
    )


def _split_by_quality(test_set: EvaluationSet, result: dict) -> tuple[list[int], list[int]]:
    """Numbers of the right and the wrong items; on a captioned set the better half by CIDEr-D and the other. Each from
    its best to its worst."""
    examples = result["examples"]
    order = sorted(range(len(examples)), key=lambda i: -examples[i]["score"])
    if test_set.classroom:
        return [i for i in order if examples[i]["right"]], [i for i in order if not examples[i]["right"]]
    return order[: len(order) // 2], order[len(order) // 2 :]


def _best_and_worst(test_set: EvaluationSet, result: dict) -> str:
    right, wrong = _split_by_quality(test_set, result)
    best, worst = (right + wrong)[:EXTREMES], (right + wrong)[-EXTREMES:]
    cards = [_card(test_set, result, i, i in set(right)) for i in [*best, *worst]]
    return f'<p class="quiet">By CIDEr-D of the picture: the first {len(best)} and the last {len(worst)}.</p>' + (
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _gallery(test_set: EvaluationSet, result: dict) -> str:
    """Pictures one can filter, in the order of the set."""
    right, wrong = _split_by_quality(test_set, result)
    names = ("right", "wrong") if test_set.classroom else ("better half", "other half")
    chosen = sorted([*sorted(right)[:GALLERY], *sorted(wrong)[:GALLERY]])
    good = set(right)
    cards = "".join(_card(test_set, result, i, i in good) for i in chosen)
    return (
        f'<p class="quiet">{len(chosen)} of {result["n"]}: the first {min(len(right), GALLERY)} {names[0]} and '
        f"the first {min(len(wrong), GALLERY)} {names[1]}.</p>"
        '<div><input class="filter" type="radio" name="show" id="all" checked><label for="all">all</label>'
        f'<input class="filter" type="radio" name="show" id="only-right"><label for="only-right">{names[0]}</label>'
        f'<input class="filter" type="radio" name="show" id="only-wrong"><label for="only-wrong">{names[1]}</label>'
        f'<div class="cards">{cards}</div></div>'
    )


def _pairs(title: str, held: dict) -> str:
    """A list of names and values that opens on a tap."""
    rows = [[name.replace("_", " "), _number(value)] for name, value in held.items() if value is not None]
    return f"<details><summary>{title}</summary>{_table(['', ''], rows)}</details>"
