"""What the diagrams are drawn with: a card, its boxes, arrows and cells, and shapes read off a running model."""

import itertools
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from flamingo.figures.run_figures import plt
from flamingo.files import write_atomically

INK, SOFT = "#24292f", "#6b7280"  # text and arrows, less important text
FROZEN, TRAINED, DATA = ("#e4e9f2", "#8b9ab5"), ("#ffe3c2", "#e08b2c"), ("#ffffff", "#9aa1ab")  # fill, edge
PICTURE_COLORS = ("#1b7f79", "#c2571a", "#7a5ea8", "#2f6fbd")  # of the first, second, … picture
WORDS = "<image>"


class Card:
    """A white card with round corners, so that it reads on light and dark pages. Coordinates are pixels at 800 wide,
    from the lower left corner."""

    def __init__(self, width: int, height: int):
        # 72 points an inch: a point of the font is a pixel of the card.
        self.figure = plt.figure(figsize=(width / 72, height / 72))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")
        self._patch(2, 2, width - 4, height - 4, ("white", "#d0d7de"), rounding=12, zorder=-1)

    def _patch(self, x, y, w, h, colors, rounding=6.0, **how):
        style = f"round,pad=0,rounding_size={rounding}"
        how = {"lw": 1.2, "zorder": 1} | how
        self.axes.add_patch(plt.matplotlib.patches.FancyBboxPatch(
            (x, y), w, h, boxstyle=style, fc=colors[0], ec=colors[1], **how))  # fmt: skip

    def box(self, x: float, y: float, w: float, h: float, text: str, colors=DATA, size: float = 13) -> None:
        self._patch(x, y, w, h, colors)
        self.text(x + w / 2, y + h / 2, text, size)

    def text(self, x: float, y: float, text: str, size: float = 12, color: str = INK, **how) -> None:
        how = {"ha": "center", "va": "center", "zorder": 3, "linespacing": 1.35} | how
        self.axes.text(x, y, text, fontsize=size, color=color, **how)

    def arrow(self, *points: tuple[float, float], color: str = INK, head: bool = True) -> None:
        """Along the points, with a head at the last."""
        for a, b in itertools.pairwise(points[: None if not head else -1]):
            self.axes.plot([a[0], b[0]], [a[1], b[1]], color=color, lw=1.4, zorder=2, solid_capstyle="butt")
        if head:
            style = {"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}
            self.axes.annotate("", points[-1], points[-2], arrowprops=style, zorder=2)

    def picture(self, x: float, y: float, side: float, picture: Image.Image, alpha: float | None = None) -> None:
        self.axes.imshow(picture, extent=(x, x + side, y, y + side), zorder=2, aspect="auto", alpha=alpha)

    def cells(
        self, x: float, y: float, count: int, color: str, size: tuple[float, float] = (4.4, 20), alpha: float = 1.0
    ) -> float:
        """A list of vectors: a thin cell for each, side by side. → where the list ends."""
        for i in range(count):
            corner = (x + i * size[0], y)
            self.axes.add_patch(plt.Rectangle(corner, 0.75 * size[0], size[1], fc=color, ec="none", alpha=alpha))
        return x + count * size[0]

    def frame(self, x: float, y: float, w: float, h: float) -> None:
        """Dashed, around what is done several times."""
        self._patch(x, y, w, h, ("none", SOFT), rounding=10, lw=1.4, ls=(0, (5, 4)))

    def plus(self, x: float, y: float) -> None:
        """Where a branch is added."""
        self.axes.add_patch(plt.Circle((x, y), 11, fc="white", ec=INK, lw=1.4, zorder=3))
        self.text(x, y, "+", 15, zorder=4)

    def save(self, path: Path) -> None:
        # Text as outlines looks the same everywhere; no date and fixed names: the same drawing is the same file.
        with plt.rc_context({"svg.hashsalt": "flamingo", "svg.fonttype": "path"}):
            options = {"format": "svg", "transparent": True, "metadata": {"Date": None, "Title": path.stem}}
            write_atomically(path, lambda temporary: self.figure.savefig(temporary, **options))
        plt.close(self.figure)


def shape(value) -> str:
    """`(2, 16, 192)` of a tensor."""
    return str(tuple(value.shape))


def observed_shapes(model: nn.Module, run, **modules: nn.Module) -> dict[str, str]:
    """What goes out of each named module while `run()` runs, as text."""
    seen: dict[str, str] = {}

    def hook(name: str):
        def note(module: nn.Module, inputs: tuple, out) -> None:
            seen[name] = shape(out[0] if isinstance(out, tuple) else out)

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def classroom_model():
    """A fresh model of the classroom preset, its processor, and a scene to look at."""
    from flamingo.classroom.scenes import make_scene
    from flamingo.config import TrainingOptions
    from flamingo.interop.backbones import build_flamingo
    from flamingo.presets import model_config

    torch.manual_seed(0)
    model, processor, _ = build_flamingo(model_config(TrainingOptions()))
    row = next(scene for i in itertools.count() if (scene := make_scene(0, "test", i)).layout == "row")
    return model, processor, row
