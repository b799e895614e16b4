"""Captions per second of training, optimizer step and reading of the batch included.

    python -m benchmarks.train [--json FILE]

Texts have the lengths of real captions and are the same for both sides; each side makes its batches as its own loader
does (ours: equally long captions together, a picture with all its captions; OpenFlamingo's: at random, every caption
with a picture of its own), pads to the longest of a batch, and is given the dtype and the batch size, up to 64 texts,
that suit it best.
"""

import functools
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.ours import Ours
from benchmarks.peer import Peer
from benchmarks.shapes import DTYPES, Text, make_texts
from benchmarks.timing import Spread, alternate, seconds
from flamingo.data.batches import StepSampler
from flamingo.data.feature_cache import FeatureCache
from flamingo.fast.device import tune
from flamingo.fast.precision import cast_frozen_to_bf16

CAPTIONS = 5  # of a picture
Batches = Callable[[int], list[list[Text]]]  # texts in a batch → batches, the shortest captions first


def own_batches(examples: Sequence[Sequence[Text]]) -> Batches:
    """Batches of our loader, of every length that it makes."""
    captions = len(examples[0])
    longest = [max(len(text.ids) for text in texts) for texts in examples]

    def make(batch_size: int) -> list[list[Text]]:
        sampler = StepSampler(longest.__getitem__, len(examples), max(1, batch_size // captions), 16, seed=0)
        made = [[text for i in batch for text in examples[i]] for batch in sampler]
        return sorted(made, key=lambda batch: max(len(text.ids) for text in batch))

    return make


def their_batches(examples: Sequence[Sequence[Text]]) -> Batches:
    """Batches of the peer's loader: any texts together."""

    def make(batch_size: int) -> list[list[Text]]:
        texts = [text for texts in examples for text in texts]
        random.Random("peer").shuffle(texts)
        made = [texts[i : i + batch_size] for i in range(0, len(texts) - batch_size + 1, batch_size)][:16]
        return sorted(made, key=lambda batch: max(len(text.ids) for text in batch))

    return make


def evenly(batches: Sequence[list[Text]], count: int) -> list[list[Text]]:
    """`count` of the batches, of all lengths alike."""
    return [batches[int((k + 0.5) * len(batches) / count)] for k in range(count)]


def rate(side: Ours | Peer, batches: Sequence[list[Text]], dtype: str, device: torch.device) -> float:
    """Captions per second over these batches."""
    return sum(map(len, batches)) / seconds(lambda: [side.step(batch, dtype) for batch in batches], device)


def best_dtype(side: Ours | Peer, batches: Sequence[list[Text]], device: torch.device) -> str:
    """float32, or bfloat16 autocast: what a side is faster in."""
    side.step(batches[0])  # the first step of all allocates, and is slow
    rates = {dtype: rate(side, batches, dtype, device) for dtype in DTYPES}
    return max(rates, key=rates.get)


def best_size(side: Ours | Peer, batches: Batches, sizes: Sequence[int], dtype: str, device: torch.device) -> int:
    """The batch size with which a side is fastest: larger and larger, as long as that does not hurt or fill a GPU."""
    found = {}
    for size in sizes:
        try:
            found[size] = rate(side, evenly(batches(size), 1), dtype, device)
        except torch.OutOfMemoryError:
            break
        if found[size] < 0.9 * max(found.values()):
            break
    return max(found, key=found.get)


def measure(args, folder: Path) -> dict:
    distinct = 4 if args.quick else 16
    tune(args.device)  # settings of the whole process: the peer has their benefit as well
    ours, peer = common.build_sides(args.shape, distinct, args.device)
    pool = 8 if args.quick else 192
    shared = make_texts(args.shape, pool, CAPTIONS, distinct)
    single = make_texts(args.shape, pool * CAPTIONS, 1, distinct)
    losses = common.compare_losses(ours, peer, [text for texts in shared[:2] for text in texts])

    encoder = ours.model.vision_encoder
    build = lambda: FeatureCache.open_or_build(folder, ours.pictures, "benchmark", encoder, device=args.device)  # noqa: E731
    cache_seconds = seconds(build, args.device) / distinct
    cached = Ours(ours.model, args.shape, ours.pictures, args.device, build())
    with torch.no_grad():
        losses["ours_cached"] = cached.loss(cached.batch([text for texts in shared[:2] for text in texts])).item()

    small, sizes = ([5], [8]) if args.quick else ([20, 60], [16, 64])
    # name: (side, its batches, batch sizes to try, batches of a round)
    contestants = {
        "peer": (peer, their_batches(shared), sizes, 1),
        "train_cached": (cached, own_batches(shared), small, 3),
        "train_pixels": (ours, own_batches(shared), small, 1),
        "train_pixels_single": (ours, own_batches(single), sizes, 1),
    }
    dtypes = {side: best_dtype(side, evenly(batches(5), 1), args.device)
              for side, batches in ((peer, their_batches(shared)), (cached, own_batches(shared)))}  # fmt: skip
    dtypes[ours] = dtypes[cached]  # the same model
    if dtypes[ours] == "bfloat16":
        cast_frozen_to_bf16(ours.model)  # as train.py does
    works, chosen = {}, {}
    for name, (side, batches, tried, count) in contestants.items():
        dtype = dtypes[side]
        size = best_size(side, batches, tried, dtype, args.device)
        chosen[name] = {"dtype": dtype, "texts_per_batch": size}
        print(f"{name}: {dtype}, {size} texts a batch")
        works[name] = functools.partial(rate, side, evenly(batches(size), count), dtype, args.device)
    rates = alternate(works, args.rounds)
    ratios = {name: rates[name].median / rates["peer"].median for name in contestants if name != "peer"}
    return {
        "ratios": ratios, "captions_per_second": {name: rate.to_dict() for name, rate in rates.items()},
        "chosen": chosen, "losses": losses, "cache_seconds_per_picture": cache_seconds,
        "gflop_per_caption": {name: _gflop(*contestants[name][:2], chosen[name]) for name in contestants},
    }  # fmt: skip


def _gflop(side: Ours | Peer, batches: Batches, chosen: dict) -> float:
    """GFLOP of a caption, as torch counts them (attention inside a fused kernel may be missing)."""
    from torch.utils.flop_counter import FlopCounterMode

    (batch,) = evenly(batches(min(10, chosen["texts_per_batch"])), 1)
    with FlopCounterMode(display=False) as counter:
        side.step(batch, chosen["dtype"])
    return counter.get_total_flops() / len(batch) / 1e9


TITLES = {
    "train_cached": "features cached, 5 captions a picture",
    "train_pixels": "from pixels, 5 captions a picture",
    "train_pixels_single": "from pixels, 1 caption a picture",
}


def draw(result: dict, path: Path) -> None:
    rate = {name: spread["median"] for name, spread in result["captions_per_second"].items()}
    rows = [(title, rate[name], rate["peer"]) for name, title in TITLES.items()]
    common.draw_bars(path, rows, "captions per second (longer is better)", "Training")


def main(argv: list[str]) -> None:
    args = common.parse("train", __doc__.splitlines()[0], argv)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder) / "cache")
    rates = {name: Spread(**spread) for name, spread in result["captions_per_second"].items()}
    rows = [
        (TITLES.get(name, "OpenFlamingo 2.0.1"), rate.median, f"{rate.low:.3g} … {rate.high:.3g}",
         result["gflop_per_caption"][name], result["gflop_per_caption"][name] * rate.median,
         result["ratios"].get(name, 1.0))
        for name, rate in rates.items()
    ]  # fmt: skip
    common.print_table(["", "captions/s", "middle half", "GFLOP/caption", "GFLOP/s", "× peer"], rows)
    losses, cache = result["losses"], result["cache_seconds_per_picture"]
    print(f"loss {losses['ours']:.6f}, theirs {losses['peer']:.6f}, from the cache {losses['ours_cached']:.6f}")
    print(f"the cache took {cache:.3g} s a picture to build, once")
    common.finish(args, result, draw)


if __name__ == "__main__":
    common.command("train", main, sys.argv[1:])
