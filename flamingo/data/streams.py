"""Sets too large to look at beforehand: read as they come, shuffled a little, by many processes, and resumed.

    --data 'shards/{00000..00099}.tar'                        tar files of webdataset
    --data laion/some-set --stream                            a hub's Parquet files
    --data 'docs/{000..031}.tar:0.5' --data my_pictures:0.5   several sets, mixed by weight, as Flamingo was trained

What this file teaches: how a stream is split and how it is resumed, which is one question. The *shards* are dealt out
to all workers of all processes, and each reads its own, one after the other, so nothing comes twice and nothing is
lost. Within a shard samples are read in blocks, and a block is shuffled as the seed says. So one number, how many
samples of a shard have been trained on, says what is left of it; and these numbers, one for each shard that was begun,
say where the run is, however many workers read on from there. They are counted where a batch is *used*: what workers
have prepared ahead does not count.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from flamingo import ranks
from flamingo.config import TrainingOptions
from flamingo.data.batches import Batch, Collate, Example, end_with_the_run
from flamingo.data.captions import load_captions
from flamingo.data.chunks import Chunk
from flamingo.data.places import Unusable, shown
from flamingo.data.shards_of import SetShards, TableShards, TarShards, is_tar, parts_of, some
from flamingo.errors import InputError

BLOCK = 512  # samples that are shuffled together: held as files, not as pictures
LISTED = 1000  # of what was left out, so many lines are kept


@dataclass(frozen=True)
class Origin:
    """Where an example came from: the number of its set and of its shard there, how often that was read before, and how
    many of its samples are done with it. left_out: what could not be used on the way there."""

    source: int
    shard: int
    epoch: int
    done: int
    left_out: tuple[str, ...] = ()


class HeldOut(Dataset):
    """The first samples of a stream, which are not trained on: for validation. Pictures are decoded when needed."""

    curriculum = ()
    skipped: tuple[str, ...] = ()

    def __init__(self, source, most: int):
        """At most the first half of the first shard. most: samples. Raises InputError if nothing of it can be used."""
        self.source, self.samples, faults = source, [], []
        try:
            read = some(source.samples(0), 2 * most)
        except Exception as error:  # tarfile, webdataset and datasets raise many kinds
            raise InputError(f"{shown(source.shards[0])} cannot be read: {_cause(error)}") from error
        self.read = len(read) // 2
        for sample in read[: max(1, self.read)]:
            try:
                source.example(sample)
                self.samples.append(sample)
            except Unusable as error:
                faults.append(str(error))
        if not self.samples:
            why = f"; the first: {faults[0]}" if faults else ""
            raise InputError(f"{shown(source.shards[0])}: none of its first {len(faults)} samples can be used{why}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        return self.source.example(self.samples[index])

    def texts(self, index: int) -> list[list[Chunk]]:
        return list(self[index].texts)

    def length(self, index: int) -> int:
        """Characters of the longest text."""
        return max(sum(len(chunk.prompt + chunk.caption) for chunk in text) for text in self.texts(index))

    def numbers(self, index: int) -> slice:
        return slice(index, index + 1)

    def picture(self, number: int) -> Image.Image:
        """The first picture of an example."""
        return self[number].pictures[0]


class Mixed(HeldOut):
    """What several streams hold out, one after the other."""

    def __init__(self, parts: Sequence[HeldOut]):
        self.items = [(part, i) for part in parts for i in range(len(part))]
        texts = [repr(self.texts(i)) for i in range(len(self.items))]
        self.fingerprint = hashlib.sha256("".join(texts).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        part, i = self.items[index]
        return part[i]


class Stream:
    """Sets mixed by weight, without end. Build with `load_stream`.

    Attributes: held_out: for validation. position: for each set, shard → (times read, samples done of this time), as
    far as batches have been used. skipped: what was left out (the first LISTED), left_out: how many.
    """

    def __init__(self, sources: Sequence, weights: Sequence[float], seed: int, validation: int):
        self.sources, self.weights, self.seed = sources, weights, seed
        parts = [HeldOut(source, max(2, validation // len(sources))) for source in sources]
        self.held_out, self.begin = Mixed(parts), [part.read for part in parts]
        self.position: list[dict[int, tuple[int, int]]] = [{} for _ in sources]
        self.skipped: list[str] = []
        self.left_out = 0
        names = "".join(f"{source.name} {len(source.shards)}" for source in sources)
        self.fingerprint = hashlib.sha256(f"{names} {self.weights}".encode()).hexdigest()[:16]

    def describe(self) -> str:
        parts = [f"{shown(s.name)} ({len(s.shards)} shards)" for s in self.sources]
        return f"a stream of {', '.join(parts)}"

    # ------------------------------------------------------------------------------------------------- reading
    def own_shards(self, source: int, consumer: int, consumers: int) -> list[int]:
        """The shards that one of so many workers of all processes reads."""
        count = len(self.sources[source].shards)
        return random.Random(f"{self.seed} shards").sample(range(count), count)[consumer::consumers]

    def examples(self, number: int, own: Sequence[int]) -> Iterator[tuple[Example, Origin]]:
        """Of one set, from some of its shards: from the position on, over and over. Raises InputError if all of them
        have nothing that can be used."""
        at = {shard: self.position[number].get(shard, (0, 0)) for shard in own}
        left_out, fruitless = [], 0
        while True:
            # The one least often read; of these one that was begun; of these in an order of the epoch's own.
            shard = min(own, key=lambda s: (at[s][0], at[s][1] == 0, _order(self.seed, at[s][0], s)))
            epoch, done = at[shard]
            fruitless += 1
            for example, so_far, faults in self._rest(number, shard, epoch, done):
                left_out += faults
                if example is not None:
                    fruitless = 0
                    yield example, Origin(number, shard, epoch, so_far, tuple(left_out))
                    left_out = []
            at[shard] = (epoch + 1, 0)
            if fruitless > len(own):
                why = f"; the first: {left_out[0]}" if left_out else ""
                raise InputError(f"{shown(self.sources[number].name)}: nothing in it can be used{why}")

    def _rest(self, number: int, shard: int, epoch: int, done: int) -> Iterator[tuple[Example | None, int, list[str]]]:
        """(an example, how many samples of the shard are done with it, what was left out), `done` samples on."""
        source, name = self.sources[number], shown(self.sources[number].shards[shard])
        blocks = _blocks(source, shard, self.begin[number] if shard == 0 else 0, done // BLOCK)
        for block, samples, fault in blocks:
            order = random.Random(f"{self.seed} {epoch} {shard} {block}").sample(range(len(samples)), len(samples))
            for place, i in enumerate(order):
                so_far = block * BLOCK + place + 1
                if so_far <= done:
                    continue
                try:
                    yield source.example(samples[i]), so_far, []
                except Unusable as error:
                    yield None, so_far, [f"{name}: {error}"]
            if fault:
                yield None, done, [f"{name}: cannot be read to its end: {fault}"]

    # ------------------------------------------------------------------------------------------------- batches
    def batches(
        self, collate: Collate, *, batch_size: int, steps: int, skip: int = 0, workers: int = 0, pin: bool = False
    ) -> Iterator[Batch]:
        """`steps` batches, but for the first `skip`; of several processes each makes its share of each.

        Raises InputError if there are fewer shards than workers.
        """
        consumers = ranks.count() * max(1, workers)
        for source in self.sources:
            if len(source.shards) < consumers:
                raise InputError(
                    f"{shown(source.name)} has {len(source.shards)} shard(s), and {consumers} workers (of all "
                    "processes) need one each: lower --workers, start fewer processes, or write more shards (python -m "
                    "flamingo.data.shards)"
                )
        made = _Batches(self, collate, len(ranks.share(range(batch_size))), skip, steps, ranks.rank(), ranks.count())
        loader = DataLoader(
            made, batch_size=None, num_workers=workers, pin_memory=pin, persistent_workers=workers > 0,
            worker_init_fn=end_with_the_run,
        )  # fmt: skip
        for batch, origins in loader:
            for origin in origins:
                self.position[origin.source][origin.shard] = (origin.epoch, origin.done)
                self.left_out += len(origin.left_out)
                self.skipped += origin.left_out[: LISTED - len(self.skipped)]
            yield batch

    # --------------------------------------------------------------------------------------------------- state
    def state(self) -> dict:
        """Where all processes are, for JSON. Each shard was read by one of them."""
        merged: list[dict] = [{} for _ in self.sources]
        parts = ranks.gathered((self.position, self.left_out))
        for position, _ in parts:
            for all_shards, own in zip(merged, position, strict=True):
                all_shards |= {str(shard): list(at) for shard, at in own.items()}
        return {"shards": merged, "left_out": sum(count for _, count in parts)}

    def go_on(self, state: dict) -> None:
        """From a state, with this number of processes and workers or another. Raises InputError for a damaged one."""
        try:
            found = [{int(shard): (int(at[0]), int(at[1])) for shard, at in one.items()} for one in state["shards"]]
            self.left_out = int(state["left_out"]) if ranks.is_first() else 0
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            found = []
        if len(found) != len(self.sources) or any(min(at) < 0 for one in found for at in one.values()):
            raise InputError("the position in the stream is damaged: start the run anew")
        self.position = found


def _order(seed: int, epoch: int, shard: int) -> float:
    return random.Random(f"{seed} {epoch} {shard}").random()


def _cause(error: Exception) -> str:
    """What went wrong, without what webdataset adds to it on the way."""
    return shown(str(error.args[0]).partition(" @ ")[0]) if error.args else type(error).__name__


def _blocks(source, shard: int, begin: int, first: int) -> Iterator[tuple[int, list, str]]:
    """(number, samples, fault) of each block from `first` on, without the first `begin` samples of the shard. A fault
    ends the shard."""
    number, fault = first, ""
    try:
        samples = itertools.islice(source.samples(shard), begin + first * BLOCK, None)
    except Exception as error:
        yield number, [], _cause(error)
        return
    while not fault:
        block = []
        try:
            for sample in itertools.islice(samples, BLOCK):
                block.append(sample)  # and no list(): what came before the fault is kept
        except Exception as error:  # tarfile, webdataset and datasets raise many kinds
            fault = _cause(error)
        if not block and not fault:
            return
        yield number, block, fault
        number += 1


class _Batches(IterableDataset):
    """Batches with the origins of their examples, in a worker or in the training process itself."""

    def __init__(self, stream: Stream, collate: Collate, size: int, first: int, last: int, rank: int, processes: int):
        self.stream, self.collate, self.size, self.first, self.last = stream, collate, size, first, last
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[tuple[Batch, list[Origin]]]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        number = self.first + own  # of the batch: workers take turns
        consumer = self.rank * workers + number % workers
        stream, consumers = self.stream, self.processes * workers
        readers = [stream.examples(i, stream.own_shards(i, consumer, consumers)) for i in range(len(stream.sources))]
        while number < self.last:
            draw = random.Random(f"{stream.seed} mix {self.rank} {number}")
            drawn = draw.choices(range(len(readers)), stream.weights, k=self.size)
            found = [next(readers[i]) for i in drawn]
            yield self.collate([example for example, _ in found]), [origin for _, origin in found]
            number += workers


# ------------------------------------------------------------------------------------------------------- loading
def is_stream(options: TrainingOptions) -> bool:
    if options.data is None:
        return False
    parts = parts_of(options.data)
    return options.stream or len(parts) > 1 or is_tar(parts[0][0])


def load_stream(options: TrainingOptions) -> Stream:
    """The stream that `--data` and `--stream` name. Raises InputError if one of its sets cannot be read."""
    sources, weights = [], []
    most = options.captions_per_picture
    for name, weight in parts_of(options.data):
        if is_tar(name):
            source = TarShards(name, most)
        elif options.stream:
            source = TableShards(name, most, options.image_column, options.caption_columns)
        else:
            columns = {"image_column": options.image_column, "caption_columns": options.caption_columns}
            found = load_captions(name, **columns, seed=options.seed, allow_outside=options.allow_outside)
            source = SetShards(found["train"].with_few_captions(most))
        sources.append(source)
        weights.append(weight)
    return Stream(sources, weights, options.seed, options.eval_batches * options.batch_size)
