"""What the loop in train.py calls by name: validation, the table of parts, what may not be and what does not fit."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from flamingo import ranks
from flamingo.config import TrainingOptions
from flamingo.data.batches import Batch, Collate, StepSampler
from flamingo.errors import InputError
from flamingo.fast.precision import autocast
from flamingo.limits import must_fit
from flamingo.model.vlm import VisionLanguageModel
from flamingo.training.resume import ResumePoints, way_out

FITTED = 128  # pictures whose features say what a channel's mean and deviation are


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
    *sums, targets = ranks.total(*totals.values(), targets)
    return {name: total / max(1, targets) for name, total in zip(totals, sums, strict=True)}


def seed_dropout(step: int, options: TrainingOptions) -> None:
    """What dropout draws in a step is a function of (seed, step) alone, so that a resumed run draws the same. (And of
    the process, since each has texts of its own.)"""
    torch.manual_seed(_seed(options, step * ranks.count() + ranks.rank()))


def _seed(options: TrainingOptions, number: int) -> int:
    """Of the number-th thing that a run draws."""
    return (options.seed * 1_000_003 + number) % 2**63


def some_patches(batch: Batch, step: int, options: TrainingOptions) -> Batch:
    """The batch with a share of each picture's patches, the same places for all; a function of (seed, step) alone.

    (It is to features what a random crop is to pictures. The resampler does not mind how many patches there are; what
    needs them all in their places is refused in presets.py.)
    """
    if options.patches == 1 or batch.features is None:
        return batch
    v = batch.features.shape[2]
    generator = torch.Generator().manual_seed(_seed(options, step))
    places = torch.randperm(v, generator=generator)[: max(1, round(options.patches * v))]
    return replace(batch, features=batch.features[:, :, places])  # (N, F, v, d)


@torch.no_grad()
def fit_features(model: VisionLanguageModel, examples: Dataset, collate: Collate, device: torch.device) -> None:
    """Let a tokenizer that standardizes features begin with those of `FITTED` training pictures, evenly spread."""
    if not hasattr(model.vision_tokenizer, "fit_features"):
        return
    examples = getattr(examples, "held_out", examples)  # of a stream
    for_fit = [examples[i] for i in range(0, len(examples), max(1, len(examples) // FITTED))]
    batch = collate(for_fit).to(device)
    features = model.encode_images(batch.pixel_values) if batch.features is None else batch.features
    model.vision_tokenizer.fit_features(features)


def describe(model: VisionLanguageModel) -> str:
    """What is trained and what is frozen, with counts: a table for the terminal."""
    parts = {
        "vision encoder": model.vision_encoder,
        "vision tokenizer": model.vision_tokenizer,
        "cross-attention": nn.ModuleList(model.cross_attention_blocks()),
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


def finite_loss(
    step: int, loss: Tensor, norm: Tensor, examples: Dataset, points: ResumePoints, left_out: int
) -> float | None:
    """The loss of a step as a number: the only look at values in a step, once its gradient has been queued and before
    any weight moves. norm: of the gradient. left_out: steps that were, so far.

    None for a step to leave out, as its loss or norm is not finite: all weights would be nonsense from there on. Raises
    InputError if that is one more than --skip-bad-steps allows.
    """
    values = torch.stack([loss, norm.to(loss)]).tolist()
    bad = [(name, value) for name, value in zip(("loss", "gradient's norm"), values, strict=True)
           if not math.isfinite(value)]  # fmt: skip
    if not bad:
        return values[0]
    if left_out < points.options.skip_bad_steps:
        return None
    (name, value), read = bad[0], examples_of_step(step, examples, points.options)
    shown = ", ".join(map(str, read[:8])) + (", …" if len(read) > 8 else "") if read else "of a stream"
    before = f", and {left_out} before it were left out" if left_out else ""
    way = way_out(points.file.parent)
    raise InputError(f"the {name} of step {step + 1} is {value} (training examples {shown}){before}: {way}")


def examples_of_step(step: int, examples: Dataset, options: TrainingOptions) -> list[int]:
    """Numbers of the training examples that a step reads; none are known of a stream."""
    if not hasattr(examples, "__len__"):
        return []
    count = options.accumulate
    sampler = StepSampler(
        examples.length, len(examples), options.batch_size, (step + 1) * count, options.seed, examples.curriculum,
        skip=step * count,
    )  # fmt: skip
    return [number for batch in sampler for number in batch]


# ------------------------------------------------------------------------------------------------------ what fits
KEPT = 8  # times its input: less than a decoder layer and its cross-attention keep for the backward pass
ORDER = 40  # bytes for each example of an epoch, to draw the order


def validation_batches(
    options: TrainingOptions, model: VisionLanguageModel, collate: Collate, train: Dataset, validation: Dataset
) -> int:
    """Batches of a validation: those of the option, but no more than there are examples for.

    Raises InputError if they, or the order of the training examples, or on a CPU a training step, need more memory than
    there is. (All three are lower bounds.)
    """
    size = min(options.batch_size, len(validation))
    count = min(options.eval_batches, math.ceil(len(validation) / size))
    one = collate([validation[0]])
    read = sum(value.nbytes for value in one.inputs().values() if isinstance(value, Tensor))
    must_fit(count * size * read, f"{count:,} batches of validation", "lower --eval-batches or --batch-size")
    known = len(train) if hasattr(train, "__len__") else options.batch_size  # a stream has no order to draw
    must_fit(ORDER * known, f"the order of {known:,} examples", "lower --steps, --accumulate or --batch-size")
    if next(model.vision_tokenizer.parameters()).device.type == "cpu":
        lm, size = model.lang_encoder.config, min(options.batch_size, known)
        layers = 1 if options.gradient_checkpointing else lm.num_hidden_layers
        kept = KEPT * layers * one.input_ids.numel() * lm.hidden_size * 4
        here = size * ranks.on_this_machine() / ranks.count()  # examples on this machine
        must_fit(here * (read + kept), f"--batch-size {size:,}", "lower it and raise --accumulate by the same factor")
    return count
