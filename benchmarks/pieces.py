"""What each piece of flamingo/fast is worth: a training step without any, with each alone, with all.

    python -m benchmarks.pieces [--json FILE]

Ours alone. Two cases: a step of the default run (its batches as they come, from pixels), and a step at the shapes of
OPT-125m and ViT-L-14 (random weights, features cached, five captions a picture). Every variant begins with the same
weights and takes the same batches, in turn, in the precision that `train.py` chooses. Timed are forward and backward
pass; AdamW takes the same time for all. A ratio is plain seconds over a variant's seconds: above 1 is faster.
"""

import copy
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks import common
from benchmarks.ours import build_ours
from benchmarks.shapes import language_model, make_texts, pad, vision_tower
from benchmarks.timing import Spread, alternate, seconds
from flamingo.data.batches import Batch, Collate, batches, caption_labels
from flamingo.fast.device import tune
from flamingo.fast.enable import enable
from flamingo.fast.packing import TextLayout
from flamingo.fast.precision import autocast, bf16_is_faster, cast_frozen_to_bf16
from flamingo.figures.run_figures import plt
from flamingo.interop.backbones import build_flamingo
from flamingo.presets import model_config
from flamingo.training.command_line import parse_training_options
from flamingo.training.sources import training_sets

VARIANTS = {
    "plain": (), "grouped attention": ("grouped",), "chunked cross entropy": ("chunked",),
    "chunked cross entropy, packing": ("chunked", "packed"), "few pictures at once": ("few_at_once",),
    "all": ("grouped", "chunked", "packed", "few_at_once"),
}  # fmt: skip
CAPTIONS = 5


class Variant:
    """A copy of a model with some pieces installed."""

    def __init__(self, model: nn.Module, pieces: Sequence[str], device: torch.device, dtype: str):
        self.model, self.device, self.dtype = copy.deepcopy(model), device, dtype
        self.installed = enable(self.model, tuple(pieces)) if pieces else []
        if dtype == "bfloat16":
            cast_frozen_to_bf16(self.model)
        self.model.train()

    def inputs(self, batch: Batch) -> dict:
        given = batch.to(self.device).inputs()
        return given if "chunked" in self.installed else {name: v for name, v in given.items() if name != "layout"}

    def loss(self, batch: Batch) -> torch.Tensor:
        with autocast(self.device, self.dtype):
            return self.model(**self.inputs(batch)).loss

    def step(self, batch: Batch) -> None:
        self.loss(batch).backward()
        self.model.zero_grad(set_to_none=True)

    def steps(self, some: Sequence[Batch]) -> float:
        """Seconds a step."""
        return seconds(lambda: [self.step(batch) for batch in some], self.device) / len(some)


def default_run(args) -> tuple[nn.Module, list[Batch]]:
    """The model and batches of `python train.py`, after its curriculum."""
    options = parse_training_options([])
    model, processor, config = build_flamingo(model_config(options))
    examples, _ = training_sets(options, config)
    examples.curriculum = (0, 0)  # the shorter texts of the beginning
    count = 2 if args.quick else 12
    collate = Collate(processor, options.max_tokens, layout=True)
    return model, list(batches(examples, collate, batch_size=options.batch_size, steps=count, seed=0))


def large_shapes(args) -> tuple[nn.Module, list[Batch]]:
    """The model of the other benchmarks, and batches of 60 texts about 12 pictures whose features are random."""
    shape, made = args.shape, []
    tower = vision_tower(replace(shape, vision_layers=2))  # which nobody calls
    model = build_ours(shape, tower, language_model(shape), fast=())
    draw = torch.Generator().manual_seed(0)
    for _ in range(1 if args.quick else 2):
        texts = [text for some in make_texts(shape, 2 if args.quick else 12, CAPTIONS, 4) for text in some]
        input_ids, mask = pad(texts)
        labels = caption_labels(input_ids, mask, shape.image, shape.eoc)
        patches = (shape.image_size // shape.patch_size) ** 2
        features = torch.randn(len(texts) // CAPTIONS, 1, patches, shape.vision_width, generator=draw)
        layout = TextLayout.of(labels, mask)
        made.append(Batch(input_ids, mask, labels, texts_per_image=CAPTIONS, features=features.half(), layout=layout))
    return model, made


def compare(model: nn.Module, some: Sequence[Batch], args) -> dict:
    model.to(args.device).train()
    inputs = Variant(model, (), args.device, "float32").inputs(some[0].first(32))
    dtype = "bfloat16" if bf16_is_faster(model, inputs, args.device) else "float32"
    with torch.no_grad():  # one after the other: several models of this size at once are too many
        losses = {n: Variant(model, p, args.device, "float32").loss(some[0]).item() for n, p in VARIANTS.items()}
    if max(losses.values()) - min(losses.values()) > common.TOLERANCE:
        raise RuntimeError(f"the variants do not compute the same: {losses}")
    variants = {name: Variant(model, pieces, args.device, dtype) for name, pieces in VARIANTS.items()}
    times = alternate({n: functools.partial(v.steps, some) for n, v in variants.items()}, args.rounds)
    for name, spread in times.items():
        print(f"{name}: {1000 * spread.median:.0f} ms a step")
    return {
        "dtype": dtype, "losses": losses, "installed": {name: v.installed for name, v in variants.items()},
        "ratios": {name: _ratio(times["plain"], spread) for name, spread in times.items()},
        "seconds_per_step": {name: spread.to_dict() for name, spread in times.items()},
    }  # fmt: skip


def _ratio(plain: Spread, variant: Spread) -> float:
    return plain.median / variant.median


CASES = {"default run": default_run, "OPT-125m and ViT-L-14, features cached": large_shapes}


def measure(args) -> dict:
    tune(args.device)
    results = {}
    for title, case in CASES.items():
        print(f"{title}:")
        torch.manual_seed(0)
        results[title] = compare(*case(args), args)
    return {"cases": results}


def draw(result: dict, path: Path) -> None:
    figure, several = plt.subplots(1, len(CASES), figsize=(11, 3), layout="constrained", sharey=True)
    for axes, (title, case) in zip(several, result["cases"].items(), strict=True):
        axes.barh(list(case["ratios"]), list(case["ratios"].values()), color=common.COLORS["ours"])
        for y, ratio in enumerate(case["ratios"].values()):
            axes.text(ratio, y, f" {ratio:.2f}", va="center", fontsize=9)
        axes.set(title=f"{title}, {case['dtype']}", xlabel="times as many steps as the plain model")
        axes.set_xlim(right=1.15 * max(case["ratios"].values()))
        axes.spines[["top", "right"]].set_visible(False)
    several[0].invert_yaxis()
    figure.savefig(path, dpi=110, facecolor="white", format="png")
    plt.close(figure)


def main(argv: list[str]) -> None:
    args = common.parse("pieces", __doc__.splitlines()[0], argv)
    result = measure(args)
    for title, case in result["cases"].items():
        rows = [
            (name, 1000 * case["seconds_per_step"][name]["median"], ratio) for name, ratio in case["ratios"].items()
        ]
        common.print_table([f"{title}, {case['dtype']}", "ms a step", "× plain"], rows)
    common.finish(args, result, draw)


if __name__ == "__main__":
    common.command("pieces", main, sys.argv[1:])
