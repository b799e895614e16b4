"""Every picture the program makes. Each function takes plain numbers and pictures and writes one PNG, to a path or into
an open binary file (io.BytesIO)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

os.environ.setdefault("MPLBACKEND", "Agg")  # files only: no window, no display needed (a notebook has its own)
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

CLOSE = 1.0  # CIDEr-D from which a caption counts as close to what people wrote (their own, to each other's: about 1)
COLORS = {"train": "#8a8f98", "with": "#1b7f79", "without": "#d1495b"}


def _save(figure: plt.Figure, path: Path | BinaryIO) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white", format="png")
    plt.close(figure)


def training_figure(
    path: Path | BinaryIO,
    steps: Sequence[int],
    losses: Sequence[float],
    validations: Sequence[dict],
    kept: int | None = None,
) -> None:
    """The course of a run: losses with and without the picture, and how far each gate has opened.

    Args:
        steps, losses: training loss by optimizer step.
        validations: {"step", "val_loss", "val_loss_blind", "attn": [one per layer], "ff": [one per layer]} of each
            validation; the gates as tanh(gate), a model without any has empty lists.
        kept: step of the weights that are kept, marked if it is given and not the last.
    """
    layers = len(validations[0]["attn"]) if validations else 0
    figure, axes = plt.subplots(1, 2 if layers else 1, figsize=(11 if layers else 5.5, 4), squeeze=False)
    left, right = axes[0, 0], axes[0, -1]
    left.plot(steps, losses, color=COLORS["train"], lw=0.8, alpha=0.7, label="training")
    at = [entry["step"] for entry in validations]
    left.plot(at, [entry["val_loss"] for entry in validations], "o-", color=COLORS["with"], label="validation")
    left.plot(
        at, [entry["val_loss_blind"] for entry in validations], "s--", color=COLORS["without"],
        label="validation, picture taken away",
    )  # fmt: skip
    if kept is not None and kept != at[-1]:
        left.axvline(kept, color="black", lw=0.8, ls=":", label="best weights, kept")
    left.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Does it look at the picture?")
    left.set_ylim(bottom=0, top=min(left.get_ylim()[1], 1.1 * max([*losses[:1], 1.0])) if losses else None)
    left.legend(frameon=False)
    colors = plt.get_cmap("viridis")([i / max(1, layers - 1) * 0.9 for i in range(layers)])
    for layer in range(layers):
        label = f"look {layer + 1}" if layers <= 6 or layer % 3 == 0 else None
        right.plot(at, [entry["attn"][layer] for entry in validations], color=colors[layer], label=label)
        right.plot(at, [entry["ff"][layer] for entry in validations], color=colors[layer], ls=":")
    if layers:
        right.axhline(0, color="black", lw=0.5)
        title = "Gates (attention —, feed-forward ···)"
        right.set(xlabel="optimizer step", ylabel="tanh(gate)", title=title, ylim=(-1, 1))
        right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def samples_figure(
    path: Path | BinaryIO,
    pictures: Sequence[Image.Image],
    predictions: Sequence[str],
    truths: Sequence[str],
    prompts: Sequence[str],
    similarities: Sequence[float | None],
) -> None:
    """Pictures with the predicted and a true caption. Where one caption is right, green if it is the predicted one and
    red if not; where people wrote several, the more green the higher its CIDEr-D (similarities; None: not so)."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.1 * columns, 3.8 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    for axes, picture, prediction, truth, prompt, similarity in zip(
        grid.flat, pictures, predictions, truths, prompts, similarities, strict=False
    ):
        axes.imshow(picture, interpolation="nearest" if picture.width < 128 else None)
        right = prediction == truth
        lines = ([_wrap(prompt)] if prompt else []) + [_wrap(prediction or "(nothing)")]
        lines += [] if right else [_wrap(f"true: {truth}")]
        color = COLORS["with"] if right else COLORS["without"]
        if similarity is not None:
            lines.append(f"CIDEr-D {similarity:.2f}")
            color = _shade(min(1.0, similarity / CLOSE))
        axes.set_title("\n".join(lines), fontsize=8, color=color)
    _save(figure, path)


def _shade(share: float) -> tuple[float, ...]:
    """From grey (0) to green (1)."""
    grey, green = (to_rgb(COLORS[name]) for name in ("train", "with"))
    return tuple(a + share * (b - a) for a, b in zip(grey, green, strict=True))


def _wrap(text: str, width: int = 42) -> str:
    """Break a line at spaces, and keep matplotlib from reading $…$ as mathematics."""
    lines = [""]
    for word in text.replace("$", r"\$").split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
