"""What is each layer's look worth? One attention gate is closed at a time, and the tasks are done again.

What this file teaches: a gate's value does not show what its layer does. A wide open gate may let through what a later
layer sees as well, and a small one may carry what all later layers build on. Taking it away shows it (an *ablation*).
Two tasks, because layers do different work: to name what is in a picture the last look is enough; to compare a picture
with those before it, a look must come before the layers that do the comparing.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from flamingo.evaluation.metrics import exact_match
from flamingo.evaluation.parts import Parts
from flamingo.evaluation.predictor import Predictor
from flamingo.evaluation.single_objects import Episode, binding_marks
from flamingo.evaluation.test_set import Item
from flamingo.model.language_model import FlamingoLayer
from flamingo.model.vlm import Flamingo

CAPTIONED = 200  # pictures captioned with each gate closed


@contextmanager
def gate_at(gate: nn.Parameter, opened: float) -> Iterator[None]:
    """Inside, tanh of this gate is `opened`, from -1 to 1; at 0 it is closed: its layer adds nothing."""
    trained = gate.detach().clone()
    with torch.no_grad():
        gate.fill_(math.atanh(opened) if abs(opened) < 1 else math.copysign(math.inf, opened))
    try:
        yield
    finally:
        with torch.no_grad():
            gate.copy_(trained)


@contextmanager
def gates_at(model: Flamingo, opened: Sequence[tuple[float | None, float | None]]) -> Iterator[None]:
    """Inside, tanh of the attention and feed-forward gate of each block is what `opened` says; None: as trained."""
    with ExitStack() as stack:
        for block, (attn, ff) in zip(model.cross_attention_blocks(), opened, strict=True):
            for gate, value in ((block.attn_gate, attn), (block.ff_gate, ff)):
                if value is not None:
                    stack.enter_context(gate_at(gate, value))
        yield


def without_each_gate(
    predictor: Predictor, parts: Parts, items: Sequence[Item], rows: Sequence[int], captions: Sequence[str],
    episodes: Sequence[Episode], title: str, seed: int,
) -> list[dict[str, float]]:  # fmt: skip
    """For each layer that looks {layer, gate, exact_match, exact_match_closed, binding, binding_closed}: its number,
    tanh of its attention gate, the exact match of the first items and the accuracy of fast binding as the model is, and
    with this gate closed.

    captions: of the items, as the model is. title: under which `parts` keeps its predictions for the episodes.
    """
    items, rows = items[:CAPTIONED], rows[:CAPTIONED]
    truths = [item.truths for item in items]

    def score(captions: Sequence[str], title: str) -> tuple[float, float]:
        bound = binding_marks(predictor, parts, episodes, title, seed)
        return float(exact_match(captions, truths).mean()), float(bound.mean())

    exact, binding = score(captions[:CAPTIONED], title)
    result = []
    for name, layer in predictor.model.lang_encoder.named_modules():
        if not isinstance(layer, FlamingoLayer):
            continue
        number = int(name.rpartition(".")[2])  # "model.decoder.layers.3"
        gate, closing = layer.gated_cross_attn_layer.attn_gate, f"gate {number} closed"
        opened = gate.tanh().item()
        with gate_at(gate, 0.0):
            said = parts.keep(closing, lambda: predictor.caption(rows, items, closing))  # noqa: B023 (called at once)
            exact_closed, binding_closed = score(said, f"{title}, {closing}")
        result.append({
            "layer": number, "gate": opened, "exact_match": exact, "exact_match_closed": exact_closed,
            "binding": binding, "binding_closed": binding_closed,
        })  # fmt: skip
    return result


def gates_sentence(layers: list[dict]) -> str:
    """What each layer's look is worth."""
    shown = "; ".join(
        f"before layer {held['layer']} ({held['gate']:+.2f}) {held['exact_match_closed']:.3f}, "
        f"{held['binding_closed']:.3f}"
        for held in layers
    )
    return (
        f"exact match and five-way binding with one attention gate closed: {shown} "
        f"(all open: {layers[0]['exact_match']:.3f}, {layers[0]['binding']:.3f})"
    )
