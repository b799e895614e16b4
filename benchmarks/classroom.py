"""What a step of the default run, `python train.py`, spends its time on.

    python -m benchmarks.classroom [--json FILE]

The same model, batches and optimizer; each part of a step timed alone, over batches as they come after the curriculum.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.timing import Spread, seconds
from flamingo.data.batches import Collate, batches
from flamingo.fast.device import tune
from flamingo.fast.enable import enable
from flamingo.fast.precision import autocast, bf16_is_faster, cast_frozen_to_bf16
from flamingo.figures.run_figures import plt
from flamingo.interop.backbones import build_flamingo
from flamingo.presets import model_config
from flamingo.training.command_line import parse_training_options
from flamingo.training.optimizer import make_optimizer
from flamingo.training.sources import texts_in_a_row, training_sets

PARTS = {
    "data": "draw the scenes, tell them, make the batch", "encode": "frozen vision encoder",
    "forward": "resampler, cross-attention, language model", "backward": "gradients of what trains",
    "update": "clip the gradient, Muon and AdamW",
}  # fmt: skip


def measure(args) -> dict:
    torch.manual_seed(0)
    tune(args.device)
    options = parse_training_options([])
    model, processor, config = build_flamingo(model_config(options))
    model.to(args.device).train()
    enable(model)
    examples, _ = training_sets(options, config)
    examples.curriculum = (0, 0)  # the shorter texts of the beginning
    steps = 3 if args.quick else 16 * args.rounds
    stream = iter(
        batches(
            examples,
            Collate(processor, options.max_tokens, layout=True, join=texts_in_a_row(examples)),
            batch_size=options.batch_size,
            steps=steps + 1,
            seed=0,
        )
    )
    batch = next(stream).to(args.device)
    dtype = "bfloat16" if bf16_is_faster(model, batch.first(32).inputs(), args.device) else "float32"
    if dtype == "bfloat16":
        cast_frozen_to_bf16(model)
    optimizer = make_optimizer(model, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    made: dict = {}  # what one part hands to the next

    def timed(part: str, work: Callable[[], object]) -> None:
        times[part].append(seconds(lambda: made.__setitem__(part, work()), args.device))

    def encode():
        with torch.no_grad(), autocast(args.device, dtype):
            return model.encode_images(made["data"].pixel_values)

    def forward():
        texts = {name: value for name, value in made["data"].inputs().items() if name != "pixel_values"}
        with autocast(args.device, dtype):
            return model(**texts, features=made["encode"]).loss

    def update():
        torch.nn.utils.clip_grad_norm_(trained, options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    captions = 0
    for _ in range(steps):
        timed("data", lambda: next(stream).to(args.device))
        timed("encode", encode)
        timed("forward", forward)
        timed("backward", lambda: made["forward"].backward())
        timed("update", update)
        captions += made["data"].captions
    total = sum(map(sum, times.values()))
    return {
        "dtype": dtype, "captions_per_second": captions / total, "seconds_per_step": total / steps,
        "share": {part: sum(spent) / total for part, spent in times.items()},
        "seconds": {part: Spread.of(spent).to_dict() for part, spent in times.items()},
    }  # fmt: skip


def draw(result: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    axes.barh(
        [f"{part}: {what}" for part, what in PARTS.items()], result["share"].values(), color=common.COLORS["ours"]
    )
    axes.invert_yaxis()
    axes.set(xlabel="share of the time of a step")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, facecolor="white", format="png")
    plt.close(figure)


def main(argv: list[str]) -> None:
    args = common.parse("classroom", __doc__.splitlines()[0], argv)
    result = measure(args)
    rows = [(part, PARTS[part], 1000 * spread["median"], f"{result['share'][part]:.0%}")
            for part, spread in result["seconds"].items()]  # fmt: skip
    common.print_table(["", "", "median ms", "share"], rows)
    print(f"{result['captions_per_second']:.0f} captions a second in {result['dtype']}")
    common.finish(args, result, draw)


if __name__ == "__main__":
    common.command("classroom", main, sys.argv[1:])
