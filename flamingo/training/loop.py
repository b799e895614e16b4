"""What the loop in train.py calls by name: validation, the table of parts, the run folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from flamingo.config import TrainingOptions
from flamingo.data.batches import Batch
from flamingo.errors import InputError
from flamingo.fast.precision import autocast
from flamingo.model.vlm import VisionLanguageModel


@torch.no_grad()
def validate(
    model: VisionLanguageModel, batches: Sequence[Batch], device: torch.device, dtype: str
) -> dict[str, float]:
    """Loss per target token with the pictures and without them. A model that does not look has both the same."""
    model.eval()
    totals, targets = {"val_loss": 0.0, "val_loss_blind": 0.0}, 0
    for batch in batches:
        count, batch = batch.targets, batch.to(device)
        targets += count
        with autocast(device, dtype):
            totals["val_loss"] += model(**batch.inputs()).loss.item() * count
            totals["val_loss_blind"] += model(**batch.inputs(), blind=True).loss.item() * count
    model.train()
    return {name: total / max(1, targets) for name, total in totals.items()}


def describe(model: VisionLanguageModel) -> str:
    """What is trained and what is frozen, with counts: a table for the terminal."""
    parts = {
        "vision encoder": model.vision_encoder,
        "resampler": model.vision_tokenizer,
        "cross-attention": nn.ModuleList(x.gated_cross_attn_layer for x in model.lang_encoder._get_decoder_layers()),
    }
    counted = {id(p) for part in parts.values() for p in part.parameters()}
    rows = [(name, _counts(part.parameters())) for name, part in parts.items()]
    rows.append(("language model", _counts(p for p in model.lang_encoder.parameters() if id(p) not in counted)))
    lines = [f"{'':18}{'trained':>14}{'frozen':>14}"]
    lines += [f"{name:18}{trained:>14,}{frozen:>14,}" for name, (trained, frozen) in rows]
    trained, frozen = _counts(model.parameters())
    return "\n".join([*lines, f"{'together':18}{trained:>14,}{frozen:>14,}"])


def _counts(parameters) -> tuple[int, int]:
    parameters = list(parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters) - trained


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, frozen)."""
    return _counts(model.parameters())


def run_folder(options: TrainingOptions) -> Path:
    """The run folder: that of the run to resume, or a new one. Raises InputError if a new one cannot be made or the
    named one holds something already."""
    if options.resume:
        return Path(options.resume)
    folder = Path(options.out) if options.out else Path("runs") / options.preset
    if not options.out:
        number = 2
        while folder.exists():
            folder, number = Path("runs") / f"{options.preset}-{number}", number + 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot make the run folder {folder}: {error.strerror}") from error
    if occupied:
        raise InputError(f"{folder} is not empty: choose another --out, resume it with --resume {folder}, or delete it")
    return folder
