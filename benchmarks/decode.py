"""Time of one decode step: the next token of every text, pictures encoded and prompt read before.

    python -m benchmarks.decode [--json FILE]

Greedy for 1 and 8 texts, and a search with 3 beams; texts of 1 and of 5 pictures. Both sides generate through
transformers' `generate`, with weights in float32 and in bfloat16; a side is timed in the faster of those that give the
greedy captions of its float32. Prompts have one pad on the left, without which OpenFlamingo cannot generate on
transformers 5. (Random weights repeat themselves, so that their captions differ less readily than trained ones would.)
"""

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks import common
from benchmarks.ours import Ours
from benchmarks.peer import Peer
from benchmarks.shapes import DTYPES, PAD, Text, make_text
from benchmarks.timing import Spread, alternate

# name: (texts, pictures a text, beams)
CASES = {
    "decode_1": (1, 1, 1), "decode_8": (8, 1, 1), "decode_beam3": (1, 1, 3),
    "decode_1_images5": (1, 5, 1), "decode_8_images5": (8, 5, 1), "decode_beam3_images5": (1, 5, 3),
}  # fmt: skip
TITLES = {name: f"{texts} text{'s' * (texts > 1)}, {pictures} picture{'s' * (pictures > 1)}"
                + (f", {beams} beams" if beams > 1 else "")
          for name, (texts, pictures, beams) in CASES.items()}  # fmt: skip


class Clock(StoppingCriteria):
    """Called after every token to decide whether to stop: a good place to read the clock."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(side: Ours | Peer, texts: Sequence[Text], beams: int, steps: int) -> tuple[torch.Tensor, float]:
    """What is generated (B, steps), and the seconds of a step."""
    clock, prompt = Clock(side.device), max(len(text.ids) for text in texts)
    tokens = side.generate(
        texts, num_beams=beams, do_sample=False, min_new_tokens=steps, max_new_tokens=steps,
        suppress_tokens=[PAD, side.shape.image], stopping_criteria=StoppingCriteriaList([clock]),
    )  # fmt: skip
    return tokens[:, prompt:], (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)


def prompts(shape, count: int, pictures: int) -> list[Text]:
    """[pad] </s> <image>, after pictures - 1 captioned ones."""
    rng = random.Random("prompts")
    made = []
    for i in range(count):
        told = make_text(shape, rng, [(i + k) % 4 for k in range(pictures - 1)], tokens=8)
        made.append(Text((*told.pictures, i % 4), (PAD, *told.ids, shape.image)))
    return made


def in_best_dtype(side: Ours | Peer, steps: int) -> tuple[Ours | Peer, dict]:
    """A side with its weights as float32 or bfloat16, whichever is faster and gives the tokens of float32."""
    texts = prompts(side.shape, 8, 1)
    sides, said, times = {dtype: side.generating_in(dtype) for dtype in DTYPES}, {}, {}
    for name, candidate in sides.items():
        runs = [generate(candidate, texts, 1, steps) for _ in range(2)]
        said[name], times[name] = runs[0][0], min(seconds for _, seconds in runs)
    same = (said["bfloat16"] == said["float32"]).float().mean().item()
    best = "bfloat16" if same == 1 and times["bfloat16"] < times["float32"] else "float32"
    return sides[best], {"dtype": best, "seconds": times, "same_tokens_in_bfloat16": same}


def measure(args) -> dict:
    steps = 4 if args.quick else 16
    # No decode step sees the vision encoder, so one of two layers serves, and spares minutes before the first step.
    args.shape = replace(args.shape, vision_layers=2)
    ours, peer = common.build_sides(args.shape, 4, args.device)
    losses = common.compare_losses(ours, peer, [make_text(args.shape, random.Random(0), range(4))])
    ours.model.eval()
    peer.model.eval()
    greedy = [generate(side, prompts(args.shape, 8, 5), 1, steps)[0] for side in (ours, peer)]
    agreement = (greedy[0] == greedy[1]).float().mean().item()
    sides, chosen = {}, {}
    for name, side in (("ours", ours), ("peer", peer)):
        sides[name], chosen[name] = in_best_dtype(side, steps)
    times: dict[str, dict[str, Spread]] = {}
    for case, (count, pictures, beams) in CASES.items():
        asked = prompts(args.shape, count, pictures)
        works = {name: (lambda side=side, asked=asked, beams=beams: generate(side, asked, beams, steps)[1])
                 for name, side in sides.items()}  # fmt: skip
        times[case] = alternate(works, args.rounds)
        print(f"{TITLES[case]}: {1000 * times[case]['ours'].median:.1f} ms")
    return {
        "ratios": {case: time["peer"].median / time["ours"].median for case, time in times.items()},
        "seconds_per_step": {case: {n: s.to_dict() for n, s in time.items()} for case, time in times.items()},
        "chosen": chosen, "losses": losses, "same_greedy_tokens": agreement,
    }  # fmt: skip


def draw(result: dict, path: Path) -> None:
    rows = [(TITLES[case], 1000 * times["ours"]["median"], 1000 * times["peer"]["median"])
            for case, times in result["seconds_per_step"].items()]  # fmt: skip
    common.draw_bars(path, rows, "milliseconds a decode step (shorter is better)", "Decoding")


def main(argv: list[str]) -> None:
    args = common.parse("decode", __doc__.splitlines()[0], argv)
    result = measure(args)
    rows = []
    for case, times in result["seconds_per_step"].items():
        cells = [f"{1000 * t['median']:.1f} ({1000 * t['low']:.1f} … {1000 * t['high']:.1f})" for t in times.values()]
        rows.append((TITLES[case], *cells, result["ratios"][case]))
    common.print_table(["ms a step: median (middle half)", "ours", "OpenFlamingo 2.0.1", "× peer"], rows)
    for name, chosen in result["chosen"].items():
        print(f"{name}: {chosen['dtype']} ({chosen['same_tokens_in_bfloat16']:.0%} of its tokens the same in bfloat16)")
    print(f"the two sides generate the same tokens: {result['same_greedy_tokens']:.0%}")
    common.finish(args, result, draw)


if __name__ == "__main__":
    common.command("decode", main, sys.argv[1:])
