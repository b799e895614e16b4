"""Does the fast dtype learn the same? 200 optimizer steps in float32 and in bfloat16, from the same start.

    python -m benchmarks.precision [--json FILE]

Ours alone, at the shapes of the other benchmarks and as `train.py --preset opt-125m` begins: gates closed at first, its
learning rates and its warmup, features cached, weights that train in float32, products under autocast, frozen matrices
held in bfloat16. Each picture has a few tokens of its own, of which its captions are made anew at every step: there is
something to learn from the pictures and nothing to learn by heart. (Where a few captions are read again and again, the
loss soon falls and jumps so fast that two roundings of float32 would part as well.)
"""

import copy
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import common
from benchmarks.ours import Ours, build_ours
from benchmarks.shapes import DTYPES, Shape, Text, language_model, make_pictures, make_text, vision_tower
from flamingo.data.feature_cache import FeatureCache
from flamingo.fast.device import tune
from flamingo.fast.precision import cast_frozen_to_bf16
from flamingo.figures.run_figures import plt
from flamingo.training.command_line import parse_training_options
from flamingo.training.optimizer import make_optimizer, set_learning_rate

STEPS, PICTURES, CAPTIONS, PICTURES_A_STEP, WORDS = 200, 8, 5, 2, 16
ALLOWED = 0.01  # relative difference of the losses, mean over the steps


def told_at(shape: Shape, step: int) -> list[Text]:
    """The captions of a step: `CAPTIONS` to each of the next pictures, of random ones among that picture's tokens."""
    rng, texts = random.Random(f"step {step}"), []
    for i in range(step * PICTURES_A_STEP, (step + 1) * PICTURES_A_STEP):
        picture = i % PICTURES
        words = random.Random(f"picture {picture}").sample(range(4, shape.words), WORDS)
        texts += [make_text(shape, rng, [picture], words=words) for _ in range(CAPTIONS)]
    return texts


def learn(side: Ours, dtype: str, steps: int) -> Iterator[float]:
    """The loss of each step."""
    options = parse_training_options(["--preset", "opt-125m"])
    options.warmup_steps = min(options.warmup_steps, steps)
    side.model.train()
    side.optimizer = make_optimizer(side.model, options)
    if dtype == "bfloat16":
        cast_frozen_to_bf16(side.model)
    for step in tqdm(range(steps), desc=dtype):
        set_learning_rate(side.optimizer, step, options)
        yield side.step(told_at(side.shape, step), dtype).item()


def measure(args, folder: Path) -> dict:
    torch.manual_seed(0)
    tune(args.device)
    pictures = make_pictures(args.shape, PICTURES)
    model = build_ours(args.shape, vision_tower(args.shape), language_model(args.shape))
    cache = FeatureCache.open_or_build(folder, pictures, "benchmark", model.to(args.device).vision_encoder,
                                       device=args.device)  # fmt: skip
    steps = 24 if args.quick else STEPS
    losses = {}
    for dtype in DTYPES:
        side = Ours(copy.deepcopy(model), args.shape, pictures, args.device, cache)
        losses[dtype] = list(learn(side, dtype, steps))
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
    args = common.parse("precision", __doc__.splitlines()[0], argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder) / "cache")
    mean, largest = result["mean_difference"], result["largest_difference"]
    verdict = "within" if mean <= ALLOWED else "NOT within"
    print(f"apart by {mean:.3%} on average, {largest:.3%} at most: {verdict} {ALLOWED:.0%}")
    common.finish(args, result, draw)


if __name__ == "__main__":
    common.command("precision", main, sys.argv[1:])
