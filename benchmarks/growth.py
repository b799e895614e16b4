"""How the time of a training step grows: with pictures of a text, captions of a picture, text length and latents.

    python -m benchmarks.growth [--json FILE]

Forward and backward pass in float32, one thing growing at a time. Ours reads features from its cache, as it does when
it trains; OpenFlamingo reads pixels, as it must.
"""

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks import common
from benchmarks.ours import Ours
from benchmarks.peer import Peer
from benchmarks.shapes import Shape, Text, make_text
from benchmarks.timing import alternate, seconds
from flamingo.data.feature_cache import FeatureCache
from flamingo.fast.device import tune
from flamingo.figures.run_figures import plt
from flamingo.model.resampler import PerceiverResampler

SWEEPS = {
    "images_per_text": [1, 2, 4, 8, 16, 32],
    "captions_per_image": [1, 2, 4, 8, 16],
    "text_length": [8, 16, 32, 64, 128],
    "latents": [16, 32, 64, 128, 256],
}
QUICK_SWEEPS = {name: values[:2] for name, values in SWEEPS.items()}


def texts_of(sweep: str, value: int, shape: Shape) -> list[Text]:
    """The batch of one point of a sweep."""
    rng = random.Random("growth")
    if sweep == "images_per_text":
        return [make_text(shape, rng, range(value), tokens=8)]
    if sweep == "captions_per_image":
        return [make_text(shape, rng, [0], tokens=13) for _ in range(value)]
    length = value if sweep == "text_length" else 13
    return [make_text(shape, rng, [i], tokens=length) for i in range(4)]


def set_latents(ours: Ours, peer: Peer, count: int) -> None:
    """Resamplers of `count` latents, each side's own kind, with the same weights."""
    theirs = type(peer.model.perceiver)(dim=peer.shape.vision_width, num_latents=count).to(peer.device)
    own = PerceiverResampler(dim=ours.shape.vision_width, num_latents=count).to(ours.device)
    own.load_state_dict(theirs.state_dict())
    ours.model.perceiver, peer.model.perceiver = own, theirs


def points(args, ours: Ours, peer: Peer) -> Iterator[tuple[str, int, list[Text]]]:
    """Every point of every sweep; latents last, because they change the models."""
    for sweep, values in (QUICK_SWEEPS if args.quick else SWEEPS).items():
        for value in values:
            if sweep == "latents":
                set_latents(ours, peer, value)
            yield sweep, value, texts_of(sweep, value, args.shape)


def work(side: Ours | Peer, texts: list[Text], device: torch.device) -> float:
    """Seconds of a forward and backward pass, reading included."""
    taken = seconds(lambda: side.loss(side.batch(texts)).backward(), device)
    side.model.zero_grad(set_to_none=True)
    return taken


def measure(args, folder: Path) -> dict:
    tune(args.device)  # settings of the whole process: the peer has their benefit as well
    ours, peer = common.build_sides(args.shape, 32, args.device)
    encoder = ours.model.vision_encoder
    ours.cache = FeatureCache.open_or_build(folder, ours.pictures, "benchmark", encoder, device=args.device)
    times, differences = {}, []
    for sweep, value, texts in points(args, ours, peer):
        if value <= 4 or sweep == "latents":  # the loss from pixels is the peer's; float16 features move it a little
            from_pixels = Ours(ours.model, args.shape, ours.pictures, args.device)
            differences.append(common.compare_losses(from_pixels, peer, texts)["difference"])
        works = {"ours": lambda texts=texts: work(ours, texts, args.device),
                 "peer": lambda texts=texts: work(peer, texts, args.device)}  # fmt: skip
        times.setdefault(sweep, {})[str(value)] = alternate(works, args.rounds)
        median = {name: spread.median for name, spread in times[sweep][str(value)].items()}
        print(f"{sweep} {value}: ours {median['ours']:.3g} s, OpenFlamingo {median['peer']:.3g} s")
    ratios = {f"{sweep}_{value}": point["peer"].median / point["ours"].median
              for sweep, line in times.items() for value, point in line.items()}  # fmt: skip
    raw = {sweep: {value: {name: spread.to_dict() for name, spread in point.items()} for value, point in line.items()}
           for sweep, line in times.items()}  # fmt: skip
    return {"ratios": ratios, "seconds": raw, "losses": {"difference": max(differences)}}


def draw(result: dict, path: Path) -> None:
    figure, grid = plt.subplots(1, len(SWEEPS), figsize=(4 * len(SWEEPS), 3.4), layout="constrained")
    for axes, (sweep, line) in zip(grid, result["seconds"].items(), strict=True):
        for name, label in (("ours", "ours"), ("peer", "OpenFlamingo")):
            spreads = [point[name] for point in line.values()]
            x = list(map(int, line))
            axes.plot(x, [s["median"] for s in spreads], "o-", color=common.COLORS[label], label=label)
            axes.fill_between(x, [s["low"] for s in spreads], [s["high"] for s in spreads],
                              color=common.COLORS[label], alpha=0.25)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, list(line))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=sweep.replace("_", " "), ylabel="seconds, forward and backward")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].legend(frameon=False)
    figure.savefig(path, dpi=110, facecolor="white", format="png")
    plt.close(figure)


def main(argv: list[str]) -> None:
    args = common.parse("growth", __doc__.splitlines()[0], argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    rows = [(sweep.replace("_", " "), value, point["ours"]["median"], point["peer"]["median"],
             result["ratios"][f"{sweep}_{value}"])
            for sweep, line in result["seconds"].items() for value, point in line.items()]  # fmt: skip
    common.print_table(["", "", "ours, s", "OpenFlamingo, s", "× peer"], rows)
    common.finish(args, result, draw)


if __name__ == "__main__":
    common.command("growth", main, sys.argv[1:])
