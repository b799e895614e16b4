"""Fair timing: both sides in turn, several rounds, the median and how far the middle half spreads."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Of repeated measurements: the median, the quartiles, and all of them."""

    median: float
    low: float
    high: float
    raw: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        )
        return cls(median, low, high, tuple(values))

    def to_dict(self) -> dict:
        return asdict(self)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes; on a GPU until it is really done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def alternate(works: dict[str, Callable[[], float]], rounds: int) -> dict[str, Spread]:
    """Every work once a round, each returning its own figure: what slows the machine for a while slows all of them.
    The order turns round by round. One round before the first is not counted."""
    names, values = list(works), {name: [] for name in works}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = works[name]()
            if turn:
                values[name].append(value)
    return {name: Spread.of(figures) for name, figures in values.items()}
