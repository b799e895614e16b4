"""Flamingo, Kosmos, BLIP and LLaVA (with LoRA too) on one classroom: what each has learned, and what each costs.

    python -m benchmarks.architectures --seeds 3 [--only kosmos llava] [--json FILE] [--out FOLDER] [-- --steps 400]

All are trained by `python train.py` (what follows -- are further options of it), each for as many steps and on such a
mix of texts as its preset has (classroom/examples.py), and take the same exam (evaluate.py). Beside that, of a fresh
model: how the time of reading a text grows with its pictures, and what has to be kept of them for each further token. A
run folder that is whole is not trained again, and an exam that was taken is not taken again.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks import common
from flamingo.config import TrainingOptions
from flamingo.errors import InputError
from flamingo.fast.enable import enable
from flamingo.figures.run_figures import plt
from flamingo.files import read_json
from flamingo.interop import compat
from flamingo.interop.backbones import Built, build_flamingo
from flamingo.presets import model_config
from flamingo.run_folder import SUMMARY, read_summary
from flamingo.training.command_line import parse_training_options
from flamingo.training.loop import count_parameters

NAMES = {"flamingo": "classroom", "kosmos": "classroom-kosmos", "blip": "classroom-blip", "llava": "classroom-llava",
         "llava-lora": "classroom-llava-lora"}  # fmt: skip
COLORS = {"flamingo": "#1b7f79", "kosmos": "#d1495b", "blip": "#edae49", "llava": "#30638e",
          "llava-lora": "#7b5ea7"}  # fmt: skip
PICTURES = [1, 2, 4, 8, 16, 32]  # of one text
TEXTS, WORDS = 4, 2  # texts in a call, and words behind each picture


# ---------------------------------------------------------------------------------------------- trained and examined
def run_one(name: str, seed: int, folder: Path, options: list[str], exam: list[str]) -> dict:
    """Train and examine one architecture with one seed, as a user would → its figures. Raises InputError if a command
    fails, or the folder holds a run of other options."""
    order = ["--preset", NAMES[name], "--seed", str(seed), "--out", str(folder), *options]
    if (folder / SUMMARY).exists():
        wanted, (_, trained) = parse_training_options(order), read_summary(folder)
        names = [field.name for field in dataclasses.fields(wanted) if field.name != "out"]
        others = [name for name in names if getattr(wanted, name) != getattr(trained, name)]
        if others:
            raise InputError(f"{folder} was trained with another {others[0]}: take it away, or choose --out")
    else:
        common.run_script("train.py", *order)
    if not (folder / "evaluation.json").exists():
        common.run_script("evaluate.py", str(folder), "--shots", "0", "4", *exam)
    summary, scores = read_json(folder / SUMMARY), read_json(folder / "evaluation.json")
    return {
        "seed": seed,
        "exact_match": scores["exact_match"],
        "three_things": scores["by_objects"].get("3", {}).get("exact_match"),
        "novel": scores["exact_match_novel"],
        "binding": scores["fast_binding"]["accuracy"],
        "binding_five_way": scores["fast_binding"]["five_way"]["accuracy"],
        "shots": {k: row["exact_match"] for k, row in scores["shots"].items()},
        "questions": {k: row["exact_match"] for k, row in scores["questions"]["shots"].items()},
        "seconds": summary["seconds"],
        "captions_seen": summary["captions_seen"],
        "captions_per_second": summary["captions_per_second"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }


# -------------------------------------------------------------------------------------- what pictures in a text cost
@torch.no_grad()
def growth(built: Built, pictures: list[int], rounds: int, device: torch.device) -> list[dict]:
    """For each number of pictures in a text {pictures, seconds, kept_bytes}: to read TEXTS texts, and keys and values
    that the next token needs. seconds is None where the text has more places than the language model has positions."""
    model = built.model.to(device).eval()
    enable(model, ("grouped",))
    tokenizer, result = model.vision_tokenizer, []
    for count in pictures:
        bank = torch.randn(TEXTS * count, tokenizer.num_latents, tokenizer.dim, device=device)
        index = torch.arange(TEXTS * count, device=device).view(TEXTS, count)
        ids = torch.tensor([[model.media_token_id, *range(10, 10 + WORDS)] * count] * TEXTS, device=device)
        shown = {"latents": bank, "image_index": index, "use_cache": True}
        try:
            kept = kept_bytes(model, model(ids, **shown))
        except ValueError:  # too long
            result.append({"pictures": count, "seconds": None, "kept_bytes": None})
            continue
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            model(ids, **shown)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        result.append({"pictures": count, "seconds": statistics.median(times), "kept_bytes": kept})
    return result


def kept_bytes(model, output) -> int:
    """Of the language model's cache, and of the pictures' keys and values in cross-attention (two matrices of h·c for
    each latent; each picture once, whoever looks)."""
    cache = sum(t.nbytes for layer in compat.cache_of(output).layers for t in (layer.keys, layer.values))
    blocks, texts = model.cross_attention_blocks(), len(output.logits)
    latents = 0
    for block in blocks:
        pictures = output.logits.shape[1] // (WORDS + 1)
        latents += texts * pictures * model.vision_tokenizer.num_latents * block.attn.to_kv.out_features * 4
    return cache + latents


# ------------------------------------------------------------------------------------------------------------ report
def mean_of(runs: list[dict], what: str) -> float:
    values = [held[what] for held in runs if held[what] is not None]
    return statistics.mean(values) if values else float("nan")


SCORES = {"exact match": "exact_match", "three things": "three_things", "novel": "novel", "binding": "binding",
          "five-way": "binding_five_way"}  # fmt: skip
SHOTS = {"0 shots": ("shots", "0"), "4 shots": ("shots", "4"), "questions, 0": ("questions", "0"),
         "4 ": ("questions", "4")}  # fmt: skip
COSTS = {"captions": "captions_seen", "seconds": "seconds", "captions/s": "captions_per_second",
         "bytes": "peak_memory_bytes"}  # fmt: skip


def show(result: dict) -> None:
    """A line for each seed of each architecture, and how reading grows with pictures."""
    rows = []
    for name, held in result.items():
        for run in held["seeds"]:
            shots = [run[what].get(count, "-") for what, count in SHOTS.values()]
            scores = ["-" if run[what] is None else run[what] for what in SCORES.values()]
            costs = [f"{run[what]:,.0f}" for what in COSTS.values()]
            rows.append([f"{name}, seed {run['seed']}", *scores, *shots, f"{held['trained']:,}", *costs])
    common.print_table(["", *SCORES, *SHOTS, "trained", *COSTS], rows)
    rows = [[name, *((point["seconds"] and 1000 * point["seconds"]) or "too long" for point in held["growth"])]
            for name, held in result.items()]  # fmt: skip
    print("\nms to read 4 texts with so many pictures each")
    common.print_table(["", *(point["pictures"] for point in next(iter(result.values()))["growth"])], rows)


def draw(result: dict, path: Path) -> None:
    """What each has learned (a dot for each seed), and how time and cache grow with pictures."""
    figure, (scores, seconds, kept) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    found = result["architectures"]
    whats = {"exact_match": "all", "three_things": "three things", "novel": "novel", "binding": "binding"}
    width = 0.8 / len(found)
    for i, (name, held) in enumerate(found.items()):
        for x, what in enumerate(whats):
            at = x + (i - (len(found) - 1) / 2) * width
            scores.bar(at, mean_of(held["seeds"], what), width, color=COLORS[name])
            dots = [run[what] for run in held["seeds"] if run[what] is not None]
            scores.plot([at] * len(dots), dots, "o", color="black", ms=2)
        points = [point for point in held["growth"] if point["seconds"] is not None]
        x = [point["pictures"] for point in points]
        seconds.plot(x, [1000 * point["seconds"] for point in points], "o-", color=COLORS[name], label=name)
        kept.plot(x, [point["kept_bytes"] / 2**20 for point in points], "o-", color=COLORS[name], label=name)
    scores.set_xticks(range(len(whats)), whats.values())
    scores.set(ylim=(0, 1.03), title="exact match, and fast binding")
    seconds.legend(frameon=False, fontsize=8)
    for axes, title in ((seconds, "ms to read 4 texts"), (kept, "MiB kept for the next token")):
        axes.set(xlabel="pictures of a text", title=title, xscale="log")
        axes.set_xticks(PICTURES, PICTURES)
        axes.minorticks_off()
    for axes in (scores, seconds, kept):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, facecolor="white", format="png")
    plt.close(figure)


def main(argv: list[str]) -> None:
    own, options = common.own_and_further(argv)

    def add(parser) -> None:
        parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … (default: %(default)s)")
        parser.add_argument("--only", nargs="+", choices=tuple(NAMES), default=list(NAMES),
                            help="architectures (default: all)")  # fmt: skip
        parser.add_argument("--n", type=int, default=1000, help="test scenes (default: %(default)s)")
        parser.add_argument("--out", type=Path, default=Path("runs/architectures"),
                            help="run folders (default: %(default)s)")  # fmt: skip

    args = common.parse("architectures", __doc__.splitlines()[0], own, add)
    exam, pictures = ["--n", str(args.n)], PICTURES
    if args.quick:
        options = [*options, "--steps", "2", "--batch-size", "4", "--eval-batches", "1"]
        exam, pictures = ["--n", "4", "--queries", "4", "--trials", "1"], PICTURES[:2]
    result = {}
    for name in args.only:
        runs = [run_one(name, seed, args.out / f"{name}-{seed}", options, exam) for seed in range(args.seeds)]
        built = build_flamingo(model_config(TrainingOptions(preset=NAMES[name])))
        trained, frozen = count_parameters(built.model)
        grown = growth(built, pictures, args.rounds, args.device)
        result[name] = {"trained": trained, "frozen": frozen, "growth": grown, "seeds": runs}
    show(result)
    common.finish(args, {"n": args.n, "options": options, "architectures": result}, draw)


if __name__ == "__main__":
    common.command("architectures", main, sys.argv[1:])
