"""Examples → batches: the bank of pictures, the texts that point into it, and the labels.

What this file teaches: which tokens a captioning model is asked to predict. Not the pictures, not the padding, not
what it was told; the caption, and the token that ends it. `caption_labels` is that rule, without a Python loop.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flamingo.processor import Chunk, FlamingoProcessor, pad_image_index


@dataclass(frozen=True)
class Example:
    """Pictures and the texts about them; `Chunk.picture` counts from 0 within the example.

    Five captions of a picture are one picture and five texts of one chunk; an interleaved document is several
    pictures and one text of several chunks. `features` (pictures, F, v, d) may stand in for the pictures.
    """

    pictures: Sequence[Image.Image]
    texts: Sequence[Sequence[Chunk]]
    features: Tensor | None = None


@dataclass
class Batch:
    """What one step reads.

    image_index: (B, T_img) rows of the bank, -1 for an empty slot. input_ids, attention_mask, labels: (B, T_txt).
    The bank, one of both: pixel_values (N, F, C, H, W), or features (N, F, v, d) that were encoded before.
    """

    image_index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor | None = None
    features: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self.inputs().items()})

    def first(self, texts: int) -> "Batch":
        """The first `texts` texts and the pictures up to the last that they need."""
        pictures = int(self.image_index[:texts].max()) + 1
        is_bank = lambda name: name in ("pixel_values", "features")  # noqa: E731
        cut = {name: value[: pictures if is_bank(name) else texts] for name, value in self.inputs().items()}
        return replace(self, **cut)

    def pin_memory(self) -> "Batch":
        return replace(self, **{name: value.pin_memory() for name, value in self.inputs().items()})

    @property
    def targets(self) -> int:
        """How many tokens have a loss."""
        return int((self.labels[:, 1:] != -100).sum())

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of `Flamingo.forward`."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


def caption_labels(
    input_ids: Tensor, attention_mask: Tensor, media_token_id: int, eoc_token_id: int, told: Tensor | None = None
) -> Tensor:
    """Labels (B, T_txt): the token where there is a loss, -100 elsewhere.

    There is a loss on a token if, before it, the last <image> is later than the last <|endofchunk|>: the caption
    and the <|endofchunk|> that closes it. Not on <image>, padding, text before the first picture or between a
    <|endofchunk|> and the next <image>; nor where `told` (B, T_txt) is True (prompts).
    """
    place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    is_image, is_end = input_ids == media_token_id, input_ids == eoc_token_id
    last_image = place.masked_fill(~is_image, -1).cummax(dim=1).values  # (B, T_txt), this token included
    last_end = place.masked_fill(~is_end, -1).cummax(dim=1).values
    last_end_before = torch.cat([torch.full_like(last_end[:, :1], -1), last_end[:, :-1]], dim=1)
    asked = (last_image > last_end_before) & ~is_image & attention_mask.bool()
    if told is not None:
        asked &= ~told
    return input_ids.masked_fill(~asked, -100)


class Collate:
    """Examples → Batch. Texts longer than `max_tokens` are cut."""

    def __init__(self, processor: FlamingoProcessor, max_tokens: int):
        self.processor, self.max_tokens = processor, max_tokens

    def __call__(self, examples: Sequence[Example]) -> Batch:
        count, rows, told_rows, index_rows = 0, [], [], []  # count: pictures in the bank so far
        for example in examples:
            for chunks in example.texts:
                ids, told = self.processor.encode_chunks(chunks)
                rows.append(ids[: self.max_tokens])
                told_rows.append(told[: self.max_tokens])
                index_rows.append([count + c.picture for c in chunks if c.picture is not None])
            count += len(example.pictures) if example.features is None else len(example.features)
        input_ids, attention_mask = self.processor.pad(rows)
        told = torch.zeros_like(input_ids, dtype=torch.bool)
        image_index = pad_image_index(index_rows)
        for i, told_row in enumerate(told_rows):
            told[i, : len(told_row)] = torch.tensor(told_row)
        labels = caption_labels(
            input_ids, attention_mask, self.processor.media_token_id, self.processor.eoc_token_id, told
        )
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if examples[0].features is not None:
            bank = torch.cat([example.features for example in examples])
            return Batch(image_index, features=bank, **texts)
        pixels = self.processor.preprocess_images([picture for example in examples for picture in example.pictures])
        return Batch(image_index, pixel_values=pixels, **texts)


class StepSampler(Sampler):
    """The examples of each step: shuffled anew every epoch, a function of (seed, step) alone.

    first_lessons: in the first epoch this many leading examples come before the rest.
    skip: leave out the first steps: they were done before the run was stopped.

    A batch is as long as its longest text, and what the others lack is padding that costs as much as text. So
    `WINDOW` batches are drawn together, sorted by length and cut into batches of equals, in random order again.
    """

    WINDOW = 64

    def __init__(
        self,
        lengths: Callable[[int], int],
        size: int,
        batch_size: int,
        steps: int,
        seed: int,
        first_lessons: int = 0,
        skip: int = 0,
    ):
        self.lengths, self.size, self.batch_size = lengths, size, min(batch_size, size)
        self.steps, self.seed, self.first_lessons, self.skip = steps, seed, first_lessons, skip

    def __len__(self) -> int:
        return self.steps - self.skip

    def __iter__(self) -> Iterator[list[int]]:
        step, epoch = 0, 0
        while step < self.steps:
            for batch in self._epoch(random.Random(f"{self.seed} {epoch}"), self.first_lessons if epoch == 0 else 0):
                if step == self.steps:
                    return
                if step >= self.skip:
                    yield batch
                step += 1
            epoch += 1

    def _epoch(self, rng: random.Random, first_lessons: int) -> Iterator[list[int]]:
        for part in (range(first_lessons), range(first_lessons, self.size)):
            yield from self._shuffled(rng, rng.sample(part, len(part)))

    def _shuffled(self, rng: random.Random, order: list[int]) -> Iterator[list[int]]:
        window = self.WINDOW * self.batch_size
        for first in range(0, len(order) - self.batch_size + 1, window):
            drawn = sorted(order[first : first + window], key=self.lengths)
            cuts = range(0, len(drawn) - self.batch_size + 1, self.batch_size)
            yield from (drawn[cut : cut + self.batch_size] for cut in rng.sample(cuts, len(cuts)))


def batches(
    examples: Dataset,
    collate: Collate,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    skip: int = 0,
    workers: int = 0,
    pin: bool = False,
) -> DataLoader:
    """`steps` batches of `batch_size` examples, but for the first `skip`.

    `examples.length(i)` is any measure of how long its longest text is, `examples.first_lessons` how many come first.

    workers: processes that prepare batches ahead; 0 prepares on demand.
    """
    sampler = StepSampler(examples.length, len(examples), batch_size, steps, seed, examples.first_lessons, skip)
    return DataLoader(
        examples, batch_sampler=sampler, collate_fn=collate, num_workers=workers, pin_memory=pin,
        persistent_workers=workers > 0,
    )  # fmt: skip
