"""The figures of an evaluation. Each function takes what evaluation.json holds and gives one PNG as bytes; None where
there is nothing to show. Small and upright, so that they can be read on a phone."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from flamingo.figures.run_figures import COLORS, plt

NAMES = {
    "own": "its own\npicture", "blind": "no\npicture", "shuffled": "another's\npicture",
    "constant": "one caption\nfor all", "copy_demo": "a copied\nexample", "novel": "novel\nobjects",
    "nearest": "nearest\npicture", "typical": "typical of\nneighbours", "consensus": "best training\ncaption",
}  # fmt: skip
WORDS_ONLY, NOVEL, LIMIT = "#d1495b", "#7a5ea8", "#8a8f98"


def png(picture: plt.Figure | Image.Image) -> bytes:
    """A figure or a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.savefig(buffer, dpi=110, bbox_inches="tight", facecolor="white", format="png")
        plt.close(picture)
    return buffer.getvalue()


def _axes(title: str, ylabel: str, width: float = 5.4, height: float = 3.6) -> tuple[plt.Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set(title=title, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def controls_figure(result: dict, metric: str, label: str) -> bytes | None:
    """One metric with its own picture, with novel objects, and each control, with 95 % intervals."""
    scores = {"own": result["metrics"]}
    if result.get("novel"):
        scores["novel"] = result["novel"]["metrics"]
    scores = {name: held[metric] for name, held in (scores | result["controls"]).items() if metric in held}
    if not scores:
        return None
    values = [score["value"] for score in scores.values()]
    # An interval of resampled means holds the mean but for rounding: no error bar may have a negative length.
    below = [max(0, score["value"] - score["low"]) for score in scores.values()]
    above = [max(0, score["high"] - score["value"]) for score in scores.values()]
    figure, axes = _axes("Does it look at the picture?", label)
    colors = [{"own": COLORS["with"], "novel": NOVEL}.get(name, COLORS["train"]) for name in scores]
    axes.bar([NAMES[name] for name in scores], values, yerr=[below, above], color=colors, capsize=3)
    for x, value in enumerate(values):
        axes.annotate(f"{value:.3f}", (x, value + above[x]), ha="center", va="bottom", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(y=0.15)
    return png(figure)


def _line(axes: plt.Axes, table: dict, name: str, label: str, color: str, style: str = "o-") -> None:
    """A few-shot curve, with the spread over trials as bars."""
    rows = [(k, row) for k, row in table.items() if row.get(name) is not None]
    if rows:
        axes.errorbar(
            [k for k, _ in rows], [row[name] for _, row in rows], yerr=[row[f"{name}_spread"] for _, row in rows],
            fmt=style, color=color, capsize=3, label=label,
        )  # fmt: skip


def few_shot_figure(result: dict) -> bytes | None:
    """Captions against the number of examples: with pictures, with their texts only, and for novel objects."""
    table = result["shots"]
    if not table:
        return None
    in_classroom = "exact_match_style_given" in result
    metric, label = ("exact_match", "exact match in the examples' style") if in_classroom else ("cider_d", "CIDEr-D")
    words = "text_only_demos" if in_classroom else "cider_d_text_only_demos"
    figure, axes = _axes("Does it learn from examples?", label)
    _line(axes, table, metric, "examples with pictures", COLORS["with"])
    _line(axes, table, words, "their texts only", WORDS_ONLY, "s--")
    if in_classroom:
        _line(axes, table, "exact_match_novel", "novel objects", NOVEL, "^-")
        given = result["exact_match_style_given"]
        axes.axhline(given, color=LIMIT, lw=1, label="style named by its cue, no example")
    axes.set(xlabel="examples in the prompt (shots)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    return png(figure)


def tasks_figure(result: dict) -> bytes | None:
    """Questions and classification against the number of examples; None where there is neither."""
    tables = {name: result.get(name, {}).get("shots") for name in ("questions", "classification")}
    if not any(tables.values()):
        return None
    figure, axes = _axes("Questions and names", "right answers")
    if table := tables["questions"]:
        by_people = "vqa_accuracy" in next(iter(table.values()))
        score, words = ("vqa_accuracy", "vqa_accuracy_text_only_demos") if by_people else (
            "exact_match", "text_only_demos")  # fmt: skip
        _line(axes, table, score, "questions (VQA accuracy)" if by_people else "questions", COLORS["with"])
        _line(axes, table, words, "questions, examples' texts only", WORDS_ONLY, "s--")
    if table := tables["classification"]:
        _line(axes, table, "exact_match", "which one is it?", "#30639f", "d-")
        _line(axes, table, "text_only_demos", "which one, examples' texts only", "#30639f", "d:")
        axes.axhline(result["classification"]["chance"], color=LIMIT, lw=1, ls=":", label="guessing which one")
    if "classification_novel" in result:
        _line(axes, result["classification_novel"]["shots"], "exact_match", "which novel object is it?", NOVEL, "^-")
    axes.set(xlabel="examples in the prompt (shots)", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    return png(figure)


def one_word_figure(result: dict) -> bytes | None:
    """One word by a rule, against the number of examples, beside its controls (classroom only)."""
    if "one_word" not in result:
        return None
    table = result["one_word"]["shots"]
    figure, axes = _axes("A rule only the pictures show", "right answers")
    _line(axes, table, "exact_match", "examples with pictures", COLORS["with"])
    _line(axes, table, "text_only_demos", "their texts only", WORDS_ONLY, "s--")
    _line(axes, table, "shuffled_demos", "their pictures exchanged", LIMIT, "d--")
    axes.axhline(result["one_word"]["chance"], color="black", lw=1, ls=":", label="guessing the rule")
    axes.set(xlabel="examples in the prompt (shots)", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2)
    return png(figure)


def _bars_beside(axes: plt.Axes, labels: Sequence[str], series: dict[str, tuple[list[float], str]]) -> None:
    """Groups of bars: series is label → (a value for each group, color)."""
    width = 0.8 / len(series)
    for k, (label, (values, color)) in enumerate(series.items()):
        places = np.arange(len(labels)) + (k - (len(series) - 1) / 2) * width
        axes.bar(places, values, width=0.9 * width, color=color, label=label)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2)


def binding_figure(result: dict) -> bytes | None:
    """Fast binding beside its controls and chance (classroom only)."""
    if "fast_binding" not in result:
        return None
    bound = result["fast_binding"]
    rows = [bound, bound["five_way"]]
    figure, axes = _axes("A name learned from one showing?", "right answers", width=4.6)
    _bars_beside(axes, ["of two names", "of five names"], {
        "seen objects": ([row["accuracy"] for row in rows], COLORS["with"]),
        "novel objects": ([row["novel"]["accuracy"] for row in rows], NOVEL),
        "examples' texts only": ([row["text_only_demos"] for row in rows], WORDS_ONLY),
        "blind": ([row["blind"] for row in rows], LIMIT),
    })  # fmt: skip
    for place, row in enumerate(rows):
        axes.plot([place - 0.45, place + 0.45], [row["chance"]] * 2, color="black", lw=1, ls=":")
    return png(figure)


def gates_figure(result: dict) -> bytes | None:
    """Captions and fast binding with the attention gate of each layer closed, and with all open (classroom only)."""
    if "closed_gates" not in result:
        return None
    layers = result["closed_gates"]
    figure, axes = _axes("One gate closed", "right answers", width=4.6)
    labels = ["none", *(f"{held['layer']}\n{held['gate']:+.2f}" for held in layers)]
    captions, binding = ([layers[0][name], *(held[f"{name}_closed"] for held in layers)]
                         for name in ("exact_match", "binding"))  # fmt: skip
    _bars_beside(axes, labels, {
        "captions (exact match)": (captions, COLORS["with"]), "fast binding, of five names": (binding, NOVEL),
    })  # fmt: skip
    axes.set_xlabel("before which layer the look is closed, and its gate")
    return png(figure)


def attention_figure(
    picture: Image.Image, words: Sequence[tuple[str, Sequence[Sequence[float]]]],
    boxes: dict[str, Sequence[tuple[int, int, int, int]]],
) -> bytes:  # fmt: skip
    """A picture, and where the model looked as it generated each word.

    words: (word, grid of attention). boxes: word → where such things stand, (left, top, right, bottom) in pixels.
    """
    figure, panels = plt.subplots(1, 1 + len(words), figsize=(1.9 * (1 + len(words)), 2.3), squeeze=False)
    width, height = picture.size
    for axes in panels[0]:
        axes.imshow(picture)
        axes.axis("off")
    panels[0][0].set_title("the picture", fontsize=9)
    for axes, (word, grid) in zip(panels[0][1:], words, strict=True):
        axes.imshow(
            np.asarray(grid), extent=(0, width, height, 0), cmap="inferno", alpha=0.65, interpolation="bilinear"
        )
        for left, top, right, bottom in boxes.get(word, ()):
            axes.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, ec="cyan", lw=1.2))
        axes.set_title(f"“{word}”".replace("$", r"\$"), fontsize=9)
    return png(figure)
