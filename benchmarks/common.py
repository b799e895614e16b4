"""What every benchmark shares: its options, both sides built with the same weights, the table, the JSON, the figure."""

import argparse
import copy
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.ours import Ours, build_ours
from benchmarks.peer import Peer, build_peer
from benchmarks.shapes import FULL, QUICK, Shape, Text, language_model, make_pictures, vision_tower
from flamingo.errors import InputError, OneSentenceParser, run_command
from flamingo.fast.device import pick_device
from flamingo.figures.run_figures import plt
from flamingo.files import write_atomically, write_json

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
COLORS = {"ours": "#1b7f79", "OpenFlamingo": "#8a8f98"}
TOLERANCE = 1e-4  # of the losses, in float32


def parse(name: str, text: str, argv: Sequence[str], add: Callable[[argparse.ArgumentParser], None] | None = None):
    """The options every benchmark has. add: puts further ones."""
    parser = OneSentenceParser(prog=f"python -m benchmarks.{name}", description=text, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, raw times included, to FILE")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help=f"where to draw (default: assets/benchmark_{name}.png; quick: not)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it work? The figures mean nothing")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 5; quick: 2)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    if add:
        add(parser)
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (2 if args.quick else 5)
    if args.rounds < 1:
        raise InputError(f"--rounds must be at least 1, not {args.rounds}")
    args.figure = args.figure or (None if args.quick else ASSETS / f"benchmark_{name}.png")
    for path in (args.json, args.figure):
        if path and not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}")
    args.shape, args.device = (QUICK if args.quick else FULL), pick_device(args.device)
    return args


def own_and_further(argv: list[str]) -> tuple[list[str], list[str]]:
    """(a benchmark's own options, those of train.py that stand behind --)."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


def run_script(script: str, *arguments: str) -> None:
    """`python train.py …` or `evaluate.py …`, as a user would. Raises InputError if it fails."""
    if subprocess.run([sys.executable, str(ROOT / script), *arguments]).returncode:
        raise InputError(f"{script} {' '.join(arguments)} did not finish (see above)")


def build_sides(shape: Shape, pictures: int, device: torch.device) -> tuple[Ours, Peer]:
    """Both sides, same weights, in modules of their own."""
    torch.manual_seed(0)
    tower, lm = vision_tower(shape), language_model(shape)
    bank = make_pictures(shape, pictures)
    own_tower, own_lm = copy.deepcopy(tower), copy.deepcopy(lm)
    peer = build_peer(shape, tower, lm)
    return Ours(build_ours(shape, own_tower, own_lm, peer), shape, bank, device), Peer(peer, shape, bank, device)


def compare_losses(ours: Ours, peer: Peer, texts: Sequence[Text]) -> dict[str, float]:
    """Their losses on the same texts, in eval mode and float32. Raises RuntimeError if they are not the same: a
    comparison of two different models would be worth nothing."""
    ours.model.eval()
    peer.model.eval()
    with torch.no_grad():
        own, theirs = (side.loss(side.batch(texts)).item() for side in (ours, peer))
    ours.model.train()
    peer.model.train()
    if abs(own - theirs) > TOLERANCE:
        raise RuntimeError(f"the two sides do not compute the same: loss {own} and {theirs}")
    return {"ours": own, "peer": theirs, "difference": abs(own - theirs)}


def machine(device: torch.device) -> dict:
    """Where this was measured."""
    import transformers

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": str(device), "gpu": gpu, "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def print_table(head: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Columns as wide as they must be; numbers with three digits."""
    show = lambda cell: f"{cell:.3g}" if isinstance(cell, float) else str(cell)  # noqa: E731
    cells = [list(map(show, row)) for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


def finish(args: argparse.Namespace, result: dict, draw: Callable[[dict, Path], None]) -> None:
    """Write the JSON file and draw the figure, where there is a path."""
    result = {"quick": args.quick, "machine": machine(args.device), **result}
    if args.json:
        write_json(args.json, result)
    if args.figure:
        write_atomically(args.figure, lambda path: draw(result, path))
        print(f"drew {args.figure}")


def draw_bars(path: Path, rows: Sequence[tuple[str, float, float]], unit: str, title: str, times: bool = True) -> None:
    """A pair of bars for each (name, ours, peer's); times: and how many times they differ. White ground on any page."""
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.75 * len(rows)))
    for y, (_, own, theirs) in enumerate(rows):
        for value, offset, name in ((own, -0.2, "ours"), (theirs, 0.2, "OpenFlamingo")):
            axes.barh(y + offset, value, height=0.36, color=COLORS[name], label=name if y == 0 else None)
            axes.text(value, y + offset, f" {value:.3g}", va="center", fontsize=8)
        factor = f"{max(own, theirs) / min(own, theirs):.1f} ×" if times and min(own, theirs) > 0 else ""
        axes.text(0.99, y, factor, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=11)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(right=1.25 * max(max(own, theirs) for _, own, theirs in rows) or 1)
    axes.set(xlabel=unit, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white", format="png")
    plt.close(figure)


def command(name: str, main: Callable[[list[str]], None], argv: list[str]) -> None:
    """A mistake, a missing peer included, ends with one sentence and exit code 2."""
    run_command(f"benchmarks.{name}", lambda: main(argv))
