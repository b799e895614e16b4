"""Does the fast dtype learn the same? 200 optimizer steps in float32 and in bfloat16, from the same start.

    python -m benchmarks.precision [--json FILE]

Ours alone, at the shapes of the other benchmarks and as train.py trains: gates closed at first, features cached,
weights that train in float32, products under autocast, frozen matrices held in bfloat16. A few captions of random words
are read again and again, so that there is something to learn.
"""

import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.ours import Ours, build_ours
from benchmarks.shapes import DTYPES, Text, language_model, make_pictures, make_texts, vision_tower
from flamingo.data.feature_cache import FeatureCache
from flamingo.figures import plt
from flamingo.options import TrainingOptions
from flamingo.training import hold_frozen_in_bf16, make_optimizer, tune

STEPS, PICTURES, CAPTIONS, PICTURES_A_BATCH = 200, 8, 5, 2
ALLOWED = 0.01  # relative difference of the losses, mean over the steps


def learn(side: Ours, batches: Sequence[Sequence[Text]], dtype: str, steps: int) -> list[float]:
    """The loss of each step."""
    side.model.train()
    side.optimizer = make_optimizer(side.model, TrainingOptions(lr=1e-4, gate_lr=1e-2))
    if dtype == "bfloat16":
        hold_frozen_in_bf16(side.model)
    return [side.step(batches[step % len(batches)], dtype).item() for step in range(steps)]


def measure(args, folder: Path) -> dict:
    torch.manual_seed(0)
    tune(args.device)
    pictures = make_pictures(args.shape, PICTURES)
    model = build_ours(args.shape, vision_tower(args.shape), language_model(args.shape))
    cache = FeatureCache.open_or_build(folder, pictures, "benchmark", model.to(args.device).vision_encoder,
                                       device=args.device)  # fmt: skip
    examples = make_texts(args.shape, PICTURES, CAPTIONS, PICTURES)
    batches = [[text for example in examples[i : i + PICTURES_A_BATCH] for text in example]
               for i in range(0, PICTURES, PICTURES_A_BATCH)]  # fmt: skip
    steps = 8 if args.quick else STEPS
    losses = {}
    for dtype in DTYPES:
        side = Ours(copy.deepcopy(model), args.shape, pictures, args.device, cache)
        losses[dtype] = learn(side, batches, dtype, steps)
        print(f"{dtype}: loss {losses[dtype][0]:.4f} at first, {losses[dtype][-1]:.4f} after {steps} steps")
    apart = [abs(fast / exact - 1) for exact, fast in zip(losses["float32"], losses["bfloat16"], strict=True)]
    return {"losses": losses, "mean_difference": sum(apart) / steps, "largest_difference": max(apart)}


def draw(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for (dtype, losses), style in zip(result["losses"].items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(losses) + 1), losses, style, label=dtype)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, facecolor="white", format="png")
    plt.close(figure)


def main(argv: list[str]) -> None:
    args = report.parse("precision", __doc__.splitlines()[0], argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder) / "cache")
    mean, largest = result["mean_difference"], result["largest_difference"]
    verdict = "within" if mean <= ALLOWED else "NOT within"
    print(f"apart by {mean:.3%} on average, {largest:.3%} at most: {verdict} {ALLOWED:.0%}")
    report.finish(args, result, draw)


if __name__ == "__main__":
    report.command("precision", main, sys.argv[1:])
