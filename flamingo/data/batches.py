"""Examples → batches: the bank of pictures, the texts that point into it, and the labels.

What this file teaches: which tokens a captioning model is trained to predict. Not the pictures, not the padding, not
the prompt; the caption, and the token that ends it. `caption_labels` is that loss mask, without a Python loop.
"""

import os
import random
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flamingo import ranks
from flamingo.data.chunks import Chunk
from flamingo.data.joined import Encoded, can_be_joined, join_texts
from flamingo.data.processor import FlamingoProcessor, pad_image_index
from flamingo.fast.packing import TextLayout


@dataclass(frozen=True)
class Example:
    """Pictures and the texts about them; `Chunk.picture` counts from 0 within the example.

    Five captions of a picture are one picture and five texts of one chunk; an interleaved document is several
    pictures and one text of several chunks. `features` (pictures, F, v, d) may stand in for the pictures.
    `places`: what is known of where things stand, (picture, thing, place), each a word (training/where.py).
    """

    pictures: Sequence[Image.Image]
    texts: Sequence[Sequence[Chunk]]
    features: Tensor | None = None
    places: Sequence[tuple[int, str, str]] = ()


@dataclass
class Batch:
    """What one step reads.

    input_ids, attention_mask, labels: (B, T_txt).
    The bank, one of both: pixel_values (N, F, C, H, W), or features (N, F, v, d) that were encoded before.
    How texts point at it, one of both: image_index (B, T_img) rows of the bank, -1 for an empty slot; or
    texts_per_image, if the texts stand in the bank's order, so many to each picture.
    layout: where the real and the labelled tokens are, for flamingo/fast; None for the plain model.
    places: (W, 3) where things stand in the pictures: row of the bank, token of a thing, token of its place.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    image_index: Tensor | None = None
    texts_per_image: int | None = None
    pixel_values: Tensor | None = None
    features: Tensor | None = None
    layout: TextLayout | None = None
    places: Tensor | None = None

    def inputs(self) -> dict:
        """The keyword arguments of the model's `forward`."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def _apply(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        moved = {name: move(value) for name, value in self.inputs().items() if isinstance(value, Tensor)}
        return replace(self, **moved, layout=None if self.layout is None else self.layout.apply(move))

    def to(self, device: torch.device) -> "Batch":
        return self._apply(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self._apply(Tensor.pin_memory)

    def first(self, texts: int) -> "Batch":
        """At most the first `texts` texts, and the pictures up to the last that they need."""
        if self.texts_per_image is not None:
            pictures = max(1, min(texts, len(self.input_ids)) // self.texts_per_image)
            texts = pictures * self.texts_per_image
        else:
            pictures = int(self.image_index[:texts].max()) + 1
        is_bank = lambda name: name in ("pixel_values", "features")  # noqa: E731
        tensors = {name: value for name, value in self.inputs().items() if isinstance(value, Tensor)}
        tensors.pop("places", None)
        cut = {name: value[: pictures if is_bank(name) else texts] for name, value in tensors.items()}
        layout = self.layout and TextLayout.of(cut["labels"], cut["attention_mask"])
        return replace(self, **cut, layout=layout, places=None)

    @property
    def targets(self) -> int:
        """How many tokens have a loss."""
        return int((self.labels[:, 1:] != -100).sum())

    @property
    def captions(self) -> int:
        """How many captions (or answers) have a loss: runs of such tokens, each with the <|endofchunk|> behind it."""
        has_loss = self.labels != -100
        return int((has_loss[:, 1:-1] & has_loss[:, 2:] & ~has_loss[:, :-2]).sum())


def caption_labels(
    input_ids: Tensor, attention_mask: Tensor, media_token_id: int, eoc_token_id: int, prompt_mask: Tensor | None = None
) -> Tensor:
    """Labels (B, T_txt): the token where there is a loss, -100 elsewhere.

    There is a loss on a token if, before it, the last <image> is later than the last <|endofchunk|>: the caption
    and the <|endofchunk|> that closes it. Not on <image>, padding, text before the first picture or between a
    <|endofchunk|> and the next <image>; nor where `prompt_mask` (B, T_txt) is True.
    """
    place = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    is_image, is_end = input_ids == media_token_id, input_ids == eoc_token_id
    last_image = place.masked_fill(~is_image, -1).cummax(dim=1).values  # (B, T_txt), this token included
    last_end = place.masked_fill(~is_end, -1).cummax(dim=1).values
    last_end_before = torch.cat([torch.full_like(last_end[:, :1], -1), last_end[:, :-1]], dim=1)
    loss_mask = (last_image > last_end_before) & ~is_image & attention_mask.bool()
    if prompt_mask is not None:
        loss_mask &= ~prompt_mask
    return input_ids.masked_fill(~loss_mask, -100)


class Collate:
    """Examples → Batch. Texts longer than `max_tokens` are cut.

    room: (positions of the language model, how many of them a picture takes), for texts that pictures stand in: these
    are cut where they are longer with their pictures than that.
    join: texts of one picture each are set end to end, up to so many (joined.py); 1 for none.
    layout: work out for flamingo/fast where the real and the labelled tokens are. (The plain model has no use for it.)
    places: say where things stand, for a model that is asked (training/where.py).
    """

    def __init__(
        self, processor: FlamingoProcessor, max_tokens: int, layout: bool = False, places: bool = False, join: int = 1,
        room: tuple[int, int] | None = None,
    ):  # fmt: skip
        self.processor, self.max_tokens, self.layout, self.places = processor, max_tokens, layout, places
        self.join, self.room = join, room
        self._word_tokens: dict[str, int] = {}  # of the words that say where things stand: few, and asked for again

    def __call__(self, examples: Sequence[Example]) -> Batch:
        count, index_rows, places = 0, [], []  # count: pictures in the bank so far
        for example in examples:
            if self.places:
                places += [(count + picture, *map(self._token_of, words)) for picture, *words in example.places]
            index_rows += [[count + c.picture for c in text if c.picture is not None] for text in example.texts]
            count += len(example.pictures) if example.features is None else len(example.features)
        chunks = [text for example in examples for text in example.texts]
        encoded = self.processor.encode_texts(chunks)
        if self.join > 1 and can_be_joined(chunks):
            begin = len(self.processor.begin_ids)
            encoded, index_rows = join_texts(chunks, encoded, index_rows, begin, self.join, self.max_tokens)
        texts, _ = self._tokens_of(encoded)
        texts["layout"] = TextLayout.of(texts["labels"], texts["attention_mask"]) if self.layout else None
        texts |= point_at_bank(index_rows, count)
        texts["places"] = torch.tensor(places) if places else None
        if examples[0].features is not None:
            return Batch(features=torch.cat([example.features for example in examples]), **texts)
        pixels = self.processor.preprocess_images([picture for example in examples for picture in example.pictures])
        return Batch(pixel_values=pixels, **texts)

    def _token_of(self, word: str) -> int:
        """The last token of a word as it stands in a text."""
        if word not in self._word_tokens:
            self._word_tokens[word] = self.processor.tokenizer(f" {word}", add_special_tokens=False).input_ids[-1]
        return self._word_tokens[word]

    def tokens(self, texts: Sequence[Sequence[Chunk]]) -> tuple[dict[str, Tensor], int]:
        """Texts → ({"input_ids", "attention_mask", "labels"} (B, T_txt), how many of them were cut)."""
        return self._tokens_of(self.processor.encode_texts(texts))

    def _tokens_of(self, encoded: Sequence[Encoded]) -> tuple[dict[str, Tensor], int]:
        kept = [self._that_fit(ids) for ids, _ in encoded]
        input_ids, attention_mask = self.processor.pad([ids[:fit] for (ids, _), fit in zip(encoded, kept, strict=True)])
        prompt_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (_, is_prompt), fit in zip(prompt_mask, encoded, kept, strict=True):
            row[:fit] = torch.tensor(is_prompt[:fit])
        labels = caption_labels(
            input_ids, attention_mask, self.processor.media_token_id, self.processor.eoc_token_id, prompt_mask
        )
        cut = sum(len(ids) > fit for (ids, _), fit in zip(encoded, kept, strict=True))
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}, cut

    def _that_fit(self, ids: Sequence[int]) -> int:
        """How many tokens of a text are kept."""
        most = min(len(ids), self.max_tokens)
        if self.room is None:
            return most
        positions, of_a_picture = self.room
        taken = list(accumulate(1 + of_a_picture * (token == self.processor.media_token_id) for token in ids[:most]))
        return bisect_right(taken, positions)


def point_at_bank(rows: Sequence[Sequence[int]], pictures: int) -> dict:
    """The pictures of each text, as rows of a bank → {"texts_per_image": K} if the texts have one picture each and
    stand in the bank's order, K to each (0 0 0 1 1 1 …); else {"image_index": (B, T_img)}."""
    each, rest = divmod(len(rows), pictures) if pictures else (0, 1)
    if not rest and all(list(row) == [i // each] for i, row in enumerate(rows)):
        return {"texts_per_image": each}
    return {"image_index": pad_image_index(rows)}


class StepSampler(Sampler):
    """The examples of each step: shuffled anew every epoch, a function of (seed, step) alone.

    curriculum: in the first epoch the leading examples come before the rest, in parts of these sizes.
    skip: leave out the first steps: they were done before the run was stopped.
    share: (i, n) the i-th of n parts of every step, for the i-th of n processes.

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
        curriculum: Sequence[int] = (),
        skip: int = 0,
        share: tuple[int, int] = (0, 1),
    ):
        self.share = share
        self.lengths, self.size, self.batch_size = lengths, size, min(batch_size, size)
        self.steps, self.seed, self.curriculum, self.skip = steps, seed, curriculum, skip

    def __len__(self) -> int:
        return self.steps - self.skip

    def __iter__(self) -> Iterator[list[int]]:
        step, epoch = 0, 0
        while step < self.steps:
            for batch in self._epoch(random.Random(f"{self.seed} {epoch}"), self.curriculum if epoch == 0 else ()):
                if step == self.steps:
                    return
                if step >= self.skip:
                    first, processes = self.share
                    yield batch[first::processes]
                step += 1
            epoch += 1

    def _epoch(self, rng: random.Random, curriculum: Sequence[int]) -> Iterator[list[int]]:
        borders = [0, *accumulate(curriculum), self.size]
        for first, end in pairwise(borders):
            yield from self._shuffled(rng, rng.sample(range(first, end), end - first))

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
) -> Iterable[Batch]:
    """`steps` batches of `batch_size` examples, but for the first `skip`; of several processes each has its share.

    `examples.length(i)` is any measure of how long its longest text is, `examples.curriculum` the sizes of the parts
    that come first.

    workers: processes that prepare batches ahead; 0 prepares on demand.
    """
    if not hasattr(examples, "__len__"):  # a stream (streams.py): what it has and in which order, it alone knows
        return examples.batches(collate, batch_size=batch_size, steps=steps, skip=skip, workers=workers, pin=pin)
    share = (ranks.rank(), ranks.count())
    sampler = StepSampler(examples.length, len(examples), batch_size, steps, seed, examples.curriculum, skip, share)
    return DataLoader(
        examples, batch_sampler=sampler, collate_fn=collate, num_workers=workers, pin_memory=pin,
        persistent_workers=workers > 0, worker_init_fn=end_with_the_run,
    )  # fmt: skip


def end_with_the_run(_: int) -> None:
    """What a worker does first: it sees to it that it ends when the process is gone that started it.

    torch's own worker sees that as well, and then waits until somebody has read the batches it has made: for ever, if
    they fill the pipe, with the lock of the run's folder in its hands."""
    run = os.getppid()

    def watch() -> None:
        while os.getppid() == run:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
