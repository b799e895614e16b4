"""Texts of one picture each, set end to end: nothing is lost, and every caption stands behind its own picture."""

from collections import Counter
from itertools import pairwise

import pytest

from flamingo.classroom.examples import ClassroomScenes
from flamingo.data.batches import Collate, Example
from flamingo.data.chunks import Chunk
from flamingo.data.processor import FlamingoProcessor
from flamingo.files import asset
from flamingo.presets import model_config
from flamingo.training.command_line import parse_training_options
from flamingo.training.sources import texts_in_a_row, training_sets


@pytest.fixture(scope="module")
def processor() -> FlamingoProcessor:
    return FlamingoProcessor.from_pretrained(asset("classroom/flamingo"))


@pytest.fixture(scope="module")
def single() -> list[Example]:
    """32 training examples of one scene, with two texts each."""
    scenes = ClassroomScenes("train")
    return [scenes[i] for i in range(200) if len(scenes.texts(i)) == 2 and len(scenes.texts(i)[0]) == 1][:32]


def chunks_of(batch, processor) -> list[list[tuple[int, str]]]:
    """For each text (row of the bank, what stands behind its <image>)."""
    result = []
    for ids, mask, rows in zip(batch.input_ids, batch.attention_mask, batch.image_index, strict=True):
        read = processor.tokenizer.decode(ids[mask.bool()]).split("<image>")[1:]
        result.append(list(zip(rows[rows >= 0].tolist(), (text.strip() for text in read), strict=True)))
    return result


def test_every_caption_stands_behind_its_own_picture_and_none_is_lost(processor, single):
    alone = Collate(processor, 192)(single)
    for i in range(8):  # other examples first: other numbers of texts in a row
        order = single[i:] + single[:i]
        joined = Collate(processor, 192, join=8)(order)
        if joined.image_index is None:  # one text in a row was drawn
            continue
        texts = chunks_of(joined, processor)
        expected = [(k, f"{c.prompt} {c.caption}<|endofchunk|>".strip())
                    for k, example in enumerate(order) for text in example.texts for c in text]  # fmt: skip
        assert Counter(pair for text in texts for pair in text) == Counter(expected)
        assert joined.captions == alone.captions == 64 and joined.targets == alone.targets
        assert len(texts) < 64 and max(map(len, texts)) <= 8 and joined.input_ids.shape[1] <= 192


def test_texts_whose_prompts_begin_alike_follow_one_another(processor, single):
    joined = next(
        batch for i in range(32) if len((batch := Collate(processor, 192, join=8)(single[i:])).input_ids) < 12
    )
    kinds = [behind.partition(":")[0] for text in chunks_of(joined, processor) for _, behind in text]
    cued = [kind for kind in kinds if kind in ("Question", "In a sentence", "As a list", "As a quiz", "As a story")]
    changes = sum(a != b for a, b in pairwise(cued))
    assert len(set(cued)) > 3 and changes < len(set(cued))


def test_how_many_follow_one_another_differs_from_batch_to_batch_but_not_from_run_to_run(processor, single):
    shapes = [len(Collate(processor, 192, join=8)(single[i : i + 8]).input_ids) for i in range(24)]
    assert len(set(shapes)) > 3
    assert shapes == [len(Collate(processor, 192, join=8)(single[i : i + 8]).input_ids) for i in range(24)]


def test_no_text_becomes_longer_than_it_may_be(processor, single):
    for i in range(8):
        alone, joined = (Collate(processor, 48, join=count)(single[i:]) for count in (1, 8))
        assert joined.input_ids.shape[1] <= 48 and joined.targets == alone.targets


def test_documents_are_left_as_they_are(processor, single):
    picture = single[0].pictures[0]
    document = Example([picture, picture], [[Chunk(0, "", "a cat"), Chunk(1, "", "a dog")]])
    batch = Collate(processor, 192, join=8)([document, document])
    assert batch.input_ids.shape[0] == 2 and batch.captions == 4


def sets_of(preset: str):
    options = parse_training_options(["--preset", preset])
    return training_sets(options, model_config(options))


def test_only_the_classrooms_own_scenes_are_joined_and_in_a_stream_none():
    assert texts_in_a_row(sets_of("classroom")[0]) == 8
    assert texts_in_a_row(sets_of("classroom-kosmos")[0]) == texts_in_a_row([]) == 1  # [] like any captioned set


@pytest.mark.parametrize("preset, first_style, least, most", [
    ("classroom", "As a quiz:", 110, 190), ("classroom-kosmos", "As a quiz:", 205, 295),
    ("classroom-blip", "As a list:", 205, 295),
])  # fmt: skip
def test_a_stream_is_trained_on_more_documents_and_a_qformer_begins_with_lists(preset, first_style, least, most):
    train, validation = sets_of(preset)
    assert validation.mix == train.mix
    assert {text[0].prompt for i in range(20) for text in train.texts(i)} == {first_style, "As a telegram:"}
    documents = [validation.length(i) in (2, 3, 4, 9) and len(validation.texts(i)) == 2 for i in range(1000)]
    assert least <= sum(documents) <= most
