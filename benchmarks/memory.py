"""Peak memory of a training step, each side in a process of its own.

    python -m benchmarks.memory [--json FILE]

The same texts, 5 captions a picture, two steps (the optimizer's state comes with the first), in float32 and under
bfloat16 autocast; a side counts in the dtype in which it needs less. Counted is what a step needs above the built
model: gradients, optimizer state, activations; the whole, model included, is reported beside. On a GPU torch counts it;
on a CPU it is the peak of resident memory, which Linux alone lets us set back after building.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.ours import Ours, build_ours
from benchmarks.peer import Peer, build_peer
from benchmarks.shapes import DTYPES, FULL, QUICK, language_model, make_pictures, make_texts, vision_tower
from benchmarks.timing import Spread
from flamingo.data.feature_cache import FeatureCache
from flamingo.errors import InputError
from flamingo.fast.device import give_back_freed_memory, tune
from flamingo.fast.precision import cast_frozen_to_bf16

SIDES = {"peer": "OpenFlamingo 2.0.1", "memory": "features cached", "memory_pixels": "from pixels"}
CAPTIONS = 5


def resident_peak() -> int:
    """Bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def step_peak(which: str, dtype: str, quick: bool, texts: int, device: torch.device) -> dict[str, float]:
    """Bytes of one side: of the built model, and what two steps add at most. In a fresh process."""
    shape = QUICK if quick else FULL
    examples = make_texts(shape, -(-texts // CAPTIONS), CAPTIONS, distinct=4)
    batch = [text for example in examples for text in example][:texts]
    pictures, tower, lm = make_pictures(shape, 4), vision_tower(shape), language_model(shape)
    with tempfile.TemporaryDirectory() as folder:
        if which == "peer":
            side = Peer(build_peer(shape, tower, lm), shape, pictures, device)
        else:
            tune(device)
            model, cache = build_ours(shape, tower, lm).to(device), None
            if which == "memory":
                cache = FeatureCache.open_or_build(Path(folder), pictures, "x", model.vision_encoder, device=device)
            side = Ours(model, shape, pictures, device, cache)
            if dtype == "bfloat16":
                cast_frozen_to_bf16(model)  # as train.py does
        side.model.train()
        give_back_freed_memory()  # what building left must not count as the model's, and serve the step for nothing
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            peak = lambda: torch.cuda.max_memory_allocated(device)  # noqa: E731
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
            peak = resident_peak
        built = peak()
        for _ in range(2):
            side.step(batch, dtype)
        return {"model": built, "step": peak() - built}


def measure(args: argparse.Namespace) -> dict:
    found: dict[tuple[str, str], list[dict]] = {(name, dtype): [] for name in SIDES for dtype in DTYPES}
    for _ in range(args.rounds):
        for (name, dtype), runs in found.items():
            order = [sys.executable, "-m", "benchmarks.memory", "--side", name, "--dtype", dtype, "--texts", args.texts,
                     "--device", args.device, *(["--quick"] if args.quick else [])]  # fmt: skip
            done = subprocess.run(list(map(str, order)), capture_output=True, text=True, cwd=common.ASSETS.parent)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1]
                raise InputError(reason.split(": ", 1)[-1]) if done.returncode == 2 else RuntimeError(done.stderr)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{SIDES[name]}, {dtype}: {runs[-1]['step'] / 2**20:.0f} MiB above the model")
    steps = {key: Spread.of([run["step"] for run in runs]) for key, runs in found.items()}
    chosen = {name: min(DTYPES, key=lambda dtype: steps[name, dtype].median) for name in SIDES}
    step = {name: steps[name, dtype].median for name, dtype in chosen.items()}
    whole = {name: found[name, dtype][0]["model"] + step[name] for name, dtype in chosen.items()}
    return {
        "ratios": {name: step["peer"] / step[name] for name in SIDES if name != "peer"},
        "ratios_model_included": {name: whole["peer"] / whole[name] for name in SIDES if name != "peer"},
        "texts_per_batch": args.texts,
        "chosen": chosen,
        "step_bytes": {name: {dtype: steps[name, dtype].to_dict() for dtype in DTYPES} for name in SIDES},
        "model_bytes": {name: {dtype: found[name, dtype][0]["model"] for dtype in DTYPES} for name in SIDES},
    }


def draw(result: dict, path: Path) -> None:
    gib = {name: result["step_bytes"][name][dtype]["median"] / 2**30 for name, dtype in result["chosen"].items()}
    rows = [(SIDES[name], gib[name], gib["peer"]) for name in ("memory", "memory_pixels")]
    common.draw_bars(path, rows, "GiB above the model (shorter is better)", "Peak memory of a training step")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--texts", type=int, default=60, help="texts in the batch (default: %(default)s)")
    parser.add_argument("--side", choices=list(SIDES), help="measure one side in this process, print its bytes")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of --side (default: %(default)s)")


def main(argv: list[str]) -> None:
    args = common.parse("memory", __doc__.splitlines()[0], argv, options)
    if args.side:
        print(json.dumps(step_peak(args.side, args.dtype, args.quick, args.texts, args.device)))
        return
    if args.device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise InputError("resident memory can be measured on Linux only: use --device cuda, or a Linux machine")
    result = measure(args)
    rows = [(f"{SIDES[name]}, {dtype}", result["model_bytes"][name][dtype] >> 20, round(spread["median"]) >> 20,
             "*" if result["chosen"][name] == dtype else "")
            for name, spreads in result["step_bytes"].items() for dtype, spread in spreads.items()]  # fmt: skip
    common.print_table(["MiB", "model", "a step adds", "needs less"], rows)
    for name, ratio in result["ratios"].items():
        whole = result["ratios_model_included"][name]
        print(f"{SIDES[name]}: the peer's step takes {ratio:.3g} times as much, {whole:.3g} times with the model")
    common.finish(args, result, draw)


if __name__ == "__main__":
    common.command("memory", main, sys.argv[1:])
