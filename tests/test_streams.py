"""Streams: nothing twice and nothing lost, resumed in the middle, documents as they were written, what is broken."""

import base64
import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from PIL import Image

from flamingo import ranks
from flamingo.config import TrainingOptions
from flamingo.data import shards, streams
from flamingo.data.batches import Collate, Example
from flamingo.data.chunks import Chunk
from flamingo.data.interleaved import read_document
from flamingo.data.places import Unusable
from flamingo.data.processor import FlamingoProcessor
from flamingo.data.shards_of import parts_of
from flamingo.errors import InputError
from flamingo.files import asset
from flamingo.training.command_line import parse_training_options


def picture(color=(10, 200, 30), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(file, kind)
    return file.getvalue()


PNG = picture()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, value in files:
            info = tarfile.TarInfo(name)
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))


def captioned(folder: Path, count: int, samples: int) -> str:
    """Shards of samples with a caption that no other has."""
    for shard in range(count):
        files = []
        for i in range(samples + shard % 3):  # of unequal length
            files += [(f"{i:04}.png", PNG), (f"{i:04}.txt", f"caption {shard} {i}".encode())]
        write_tar(folder / f"{shard:03}.tar", files)
    return str(folder / f"{{000..{count - 1:03}}}.tar")


class Captions:
    """In place of `Collate`: the captions of a batch."""

    def __call__(self, examples: list[Example]) -> list[str]:
        return [example.texts[0][-1].caption for example in examples]


def stream_of(data: str, **options) -> streams.Stream:
    return streams.load_stream(TrainingOptions(data=data, batch_size=4, eval_batches=1, **options))


def as_process(monkeypatch, rank: int, count: int) -> None:
    monkeypatch.setattr(ranks, "_rank", rank)
    monkeypatch.setattr(ranks, "_count", count)


def read(stream, steps: int, skip: int = 0, workers: int = 0, batch: int = 4) -> list[list[str]]:
    return list(stream.batches(Captions(), batch_size=batch, steps=steps, skip=skip, workers=workers))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 4)


def all_captions(stream) -> set[str]:
    """Those to train on."""
    found = set()
    for shard in range(len(stream.sources[0].shards)):
        samples = list(stream.sources[0].samples(shard))[stream.begin[0] if shard == 0 else 0 :]
        found |= {sample["txt"].decode() for sample in samples}
    return found


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 0), (3, 2), (2, 3)])
def test_each_sample_is_read_once_an_epoch_whoever_reads(tmp_path, monkeypatch, small_blocks, processes, workers):
    data, seen, first_epoch = captioned(tmp_path, 7, 5), [], []
    for rank in range(processes):
        as_process(monkeypatch, rank, processes)
        stream = stream_of(data)
        for consumer in range(rank * max(1, workers), (rank + 1) * max(1, workers)):
            own = stream.own_shards(0, consumer, processes * max(1, workers))
            for example, origin in stream.examples(0, own):
                if origin.epoch:
                    break
                first_epoch.append(example.texts[0][-1].caption)
        if workers:  # and through real workers the same
            monkeypatch.setattr(ranks, "share", lambda items, n=processes: items)
            seen += [text for batch in read(stream, 3 * workers, workers=workers, batch=1) for text in batch]
    assert sorted(first_epoch) == sorted(all_captions(stream))
    assert set(seen) <= set(first_epoch) and len(seen) == len(set(seen))


def test_a_shuffled_stream_is_the_same_for_the_same_seed(tmp_path, small_blocks):
    data = captioned(tmp_path, 3, 9)
    one, same, other = (read(stream_of(data, seed=seed), 6) for seed in (0, 0, 1))
    assert one == same != other
    assert one != [sorted(batch) for batch in one]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_it_reads_on_as_if_never_stopped(tmp_path, small_blocks, workers):
    data = captioned(tmp_path, 4, 11)
    whole = read(stream_of(data), 20, workers=workers)
    for stopped in (1, 3, 8):
        first = stream_of(data)
        begun = first.batches(Captions(), batch_size=4, steps=20, workers=workers)
        assert [next(begun) for _ in range(stopped)] == whole[:stopped]
        state = json.loads(json.dumps(first.state()))
        second = stream_of(data)
        second.go_on(state)
        assert read(second, 20, skip=stopped, workers=workers) == whole[stopped:]


def test_resumed_by_other_processes_it_gives_the_rest_and_nothing_twice(tmp_path, monkeypatch, small_blocks):
    data = captioned(tmp_path, 6, 8)
    states, before = [], []
    for rank in range(2):
        as_process(monkeypatch, rank, 2)
        stream = stream_of(data)
        begun = stream.batches(Captions(), batch_size=4, steps=5)
        before += [text for _ in range(5) for text in next(begun)]
        states.append((stream.position, stream.left_out))
    monkeypatch.setattr(ranks, "gathered", lambda value: states)
    state = stream.state()
    after = []
    for rank in range(3):
        as_process(monkeypatch, rank, 3)
        stream = stream_of(data)
        stream.go_on(state)
        for example, origin in stream.examples(0, stream.own_shards(0, rank, 3)):
            if origin.epoch:
                break
            after.append(example.texts[0][-1].caption)
    assert len(before) == len(set(before)) == 20
    assert sorted(before + after) == sorted(all_captions(stream))


@pytest.mark.parametrize(
    "state", [{}, {"shards": 3}, {"shards": [], "left_out": 0}, {"shards": [{"0": [0, -1]}], "left_out": 0}]
)
def test_a_damaged_position_is_refused(tmp_path, state):
    with pytest.raises(InputError, match="position in the stream is damaged"):
        stream_of(captioned(tmp_path, 1, 4)).go_on(state)


def test_several_sets_are_mixed_by_weight(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files = [(f"{i}.{kind}", value) for i in range(40) for kind, value in (("png", PNG), ("txt", name.encode()))]
        write_tar(tmp_path / name / "0.tar", files)
    options = parse_training_options(["--data", f"{tmp_path}/a/0.tar:0.8", "--data", f"{tmp_path}/b/0.tar:0.2"])
    assert streams.is_stream(options)
    texts = [text for batch in read(streams.load_stream(options), 50) for text in batch]
    assert 0.7 < texts.count("a") / len(texts) < 0.9


def test_weights_are_read_or_refused(tmp_path):
    assert parts_of("a/{0..3}.tar:2 + b:0.5") == [("a/{0..3}.tar", 2.0), ("b", 0.5)]
    assert parts_of("folder") == [("folder", 1.0)]
    with pytest.raises(InputError, match="need a weight each"):
        parts_of("a:0.5 + b")
    with pytest.raises(InputError, match="greater than 0"):
        parts_of("a:0.5 + b:0")


def test_what_is_broken_is_left_out_and_counted(tmp_path, small_blocks):
    data = captioned(tmp_path, 4, 6)
    (tmp_path / "001.tar").write_bytes(b"this is no tar file" * 100)
    cut = (tmp_path / "002.tar").read_bytes()[: 9 * 512 + 10]  # within a file: each is a block of header, one of data
    (tmp_path / "002.tar").write_bytes(cut)
    write_tar(tmp_path / "003.tar", [("0.png", b"no picture"), ("0.txt", b"a cat"), ("1.png", PNG), ("1.txt", b"good"),
                                     ("2.png", PNG), ("3.txt", b"alone"), ("4.png", PNG), ("4.json", b"{"),
                                     ("5.png", PNG), ("5.json", b'{"other": 1}')])  # fmt: skip
    stream = stream_of(data)
    texts = [text for batch in read(stream, 6) for text in batch]
    assert "good" in texts and any(text.startswith("caption 2") for text in texts)
    reasons = "\n".join(stream.skipped)
    assert stream.left_out >= 7
    for said in (
        "001.tar: cannot be read to its end", "002.tar: cannot be read to its end", "cannot be read as a picture",
        "there is no caption", "there is no picture", "its json or txt cannot be read", "it has other",
    ):  # fmt: skip
        assert said in reasons, said


def test_bad_streams_are_refused_in_a_sentence(tmp_path, monkeypatch):
    data = captioned(tmp_path, 2, 4)
    with pytest.raises(InputError, match=r"2 shard\(s\), and 3 workers"):
        read(stream_of(data), 2, workers=3)
    with pytest.raises(InputError, match="no such file"):
        stream_of(str(tmp_path / "absent-{00..03}.tar"))
    with pytest.raises(InputError, match="from files and by file, http, https, hf, gs, sftp, ftps, scp, not by pipe"):
        stream_of("{PIPE,http}:cat x.tar")
    (tmp_path / "no.tar").write_bytes(b"nothing of a tar" * 64)
    with pytest.raises(InputError, match=r"no\.tar cannot be read"):
        stream_of(str(tmp_path / "no.tar"))
    write_tar(tmp_path / "keys.tar", [(f"{i}.json", b'{"title": "x"}') for i in range(4)])
    with pytest.raises(InputError, match=r"none of its first .* there is no picture"):
        stream_of(str(tmp_path / "keys.tar"))
    with pytest.raises(InputError, match="cannot stream"):
        (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
        stream_of(str(tmp_path / "bad.parquet"), stream=True)


# ---------------------------------------------------------------------------------------------------- documents
MMC4 = {
    "text_list": ["Before all.", "A cat sits.", "It sleeps.", "A dog runs."],
    "image_info": [{"image_name": "dog.png"}, {"image_name": "cat.png"}, {"image_name": "far.png"},
                   {"image_name": "poor.png"}],
    "similarity_matrix": [[0.1, 0.2, 0.25, 0.4], [0.1, 0.39, 0.3, 0.41], [0.2, 0.9, 0.9, 0.9], [0.2, 0.1, 0.2, 0.1]],
}  # fmt: skip


def test_an_mmc4_document_becomes_pictures_before_their_sentences():
    beside = {"dog.png": b"dog", "cat.png": b"cat", "poor.png": b"poor"}  # far.png is only an address
    document = read_document(MMC4, beside)
    # The dog's best sentence is the cat's as well, to which it is more similar: each sentence has one picture.
    assert document.pictures == [b"dog", b"cat"]
    assert document.chunks == [Chunk(None, "Before all. A cat sits."), Chunk(0, "", "It sleeps."),
                               Chunk(1, "", "A dog runs.")]  # fmt: skip
    coded = {"text_list": ["one", "two"], "image_info": [
        {"image_base64": base64.b64encode(PNG).decode(), "matched_text_index": 1, "matched_sim": 0.3}]}  # fmt: skip
    assert read_document(coded, {}).chunks == [Chunk(None, "one"), Chunk(0, "", "two")]


def test_an_obelics_document_keeps_its_order():
    texts = ["First.", None, "Of a.", None, None, "Of c."]
    row = {"texts": texts, "images": [None, "a", None, {"bytes": b"b"}, "c", None]}
    document = read_document(row, {"a": b"A", "c": b"C"})
    assert document.pictures == [b"A", b"b", b"C"]
    assert document.chunks == [Chunk(None, "First."), Chunk(0, "", "Of a."), Chunk(1), Chunk(2, "", "Of c.")]


@pytest.mark.parametrize(
    "row, why",
    [
        ({"texts": ["a"], "images": []}, "do not take turns"),
        ({"texts": ["a", None], "images": [None, "http://far/x.jpg"]}, "without a picture that is there"),
        ({"texts": [None], "images": [b"x"]}, "without a text behind"),
        ({"text_list": "no", "image_info": []}, "is no list"),
        (MMC4 | {"similarity_matrix": [[1]]}, "no row for each picture"),
    ],
)
def test_documents_that_cannot_be_used(row, why):
    with pytest.raises(Unusable, match=why):
        read_document(row, {"dog.png": b"d", "cat.png": b"c"})


def test_documents_in_shards_become_the_right_batch(tmp_path):
    """Text, image_index and labels."""
    row = {"texts": ["Look.", None, "a cat", None, "a dog"], "images": [None, "0.png", None, "1.png", None]}
    files = []
    for i in range(4):
        files += [(f"{i}.json", json.dumps(row).encode()), (f"{i}.0.png", PNG), (f"{i}.1.png", PNG)]
    write_tar(tmp_path / "0.tar", files)
    processor = FlamingoProcessor.from_pretrained(asset("classroom/flamingo"))
    stream = stream_of(str(tmp_path / "0.tar"))
    batch = next(iter(stream.batches(Collate(processor, 64), batch_size=2, steps=1)))
    assert batch.pixel_values.shape[0] == 4 and batch.image_index.tolist() == [[0, 1], [2, 3]]
    text = processor.decode(batch.input_ids[0], skip_special_tokens=False)
    assert text.endswith("Look.<image> a cat<|endofchunk|><image> a dog<|endofchunk|>")
    labelled = [int(i) for i in batch.labels[0] if i != -100]
    assert processor.decode(torch.tensor(labelled), skip_special_tokens=False) == (
        " a cat<|endofchunk|> a dog<|endofchunk|>"
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_parquet_files_are_streamed(tmp_path, workers):
    import datasets

    for part in range(3):
        rows = [{"image": {"bytes": PNG, "path": None}, "caption": f"caption {part} {i}"} for i in range(5)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"train-{part}.parquet")
    stream = stream_of(str(tmp_path), stream=True)
    assert len(stream.sources[0].shards) == 3
    assert stream.begin == [2]  # rows of the first file, which are for validation
    batch, steps = (1, 9) if workers == 3 else (4, 3)  # as many as there are for certain before a row comes again
    texts = [text for texts in read(stream, steps, workers=workers, batch=batch) for text in texts]
    assert len(texts) == len(set(texts)) == batch * steps


# -------------------------------------------------------------------------------------------------------- shards
def test_any_set_becomes_shards_that_are_read_again(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = []
    for i in range(20):
        Image.new("RGB", (64, 32), (i, i, i)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "captions": [f"one {i}", f"two {i}"]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shards.main([str(folder), str(tmp_path / "out"), "--samples", "8", "--size", "16"])
    assert "train-{00000..00002}.tar" in capsys.readouterr().out
    stream = stream_of(str(tmp_path / "out" / "train-{00000..00002}.tar"))
    examples = [stream.sources[0].example(s) for k in range(3) for s in stream.sources[0].samples(k)]
    assert len(examples) == 18 and all(e.pictures[0].size == (32, 16) and len(e.texts) == 2 for e in examples)
    with pytest.raises(InputError, match="holds shards already"):
        shards.main([str(folder), str(tmp_path / "out")])


# -------------------------------------------------------------------------------------------------------- memory
class Endless:
    """A stream that would not fit anywhere, made on the spot."""

    name, shards = "endless", ["0", "1"]

    def __init__(self, samples: int):
        self.count = samples

    def samples(self, shard: int):
        return (bytearray(100) for _ in range(self.count))

    def example(self, sample) -> Example:
        return Example((), [[Chunk(0, "", "x")]])


def test_memory_does_not_grow_with_the_length_of_the_stream():
    stream = streams.Stream([Endless(100_000)], [1.0], seed=0, validation=4)
    taken = iter(stream.examples(0, [0, 1]))
    tracemalloc.start()
    for _ in range(5_000):
        next(taken)
    _, early = tracemalloc.get_traced_memory()
    for _ in range(45_000):
        next(taken)
    _, late = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert late < 1.2 * early
