"""Scenes that never change, labels that follow the rule, and one loader for every format, broken rows included."""

import csv
import json
import random

import pytest
import torch
from conftest import EOC, IMAGE, PAD
from PIL import Image, ImageDraw, ImageFilter

from flamingo.classroom import scenes
from flamingo.classroom.examples import ClassroomScenes
from flamingo.classroom.invented import invented_names, is_held_out
from flamingo.config import ModelConfig, TrainingOptions
from flamingo.data.batches import Collate, StepSampler, caption_labels
from flamingo.data.captions import load_captions
from flamingo.data.chunks import Chunk
from flamingo.data.pictures import to_rgb
from flamingo.data.processor import FlamingoProcessor
from flamingo.data.texts import parse_interleaved
from flamingo.errors import InputError
from flamingo.files import asset
from flamingo.training.sources import training_sets


# ------------------------------------------------------------------------------------------------------ scenes
def test_a_scene_is_a_function_of_seed_split_and_index():
    a, b = scenes.make_scene(3, "train", 17), scenes.make_scene(3, "train", 17)
    assert a == b and a.draw().tobytes() == b.draw().tobytes()
    assert a != scenes.make_scene(4, "train", 17) and a != scenes.make_scene(3, "validation", 17)
    # written down once: a change here would silently change every published figure
    assert [scenes.make_scene(0, "test", i).caption("list") for i in range(3)] == GOLDEN


GOLDEN = ["yellow: toothbrush, bone, unicorn", "white: unicorn", "purple: deer, snake"]


def test_the_set_is_as_large_as_promised():
    assert len(set(scenes.OBJECTS)) == len(scenes.OBJECTS) >= 120
    assert len(scenes.GROUNDS) >= 6 and len(scenes.STYLES) >= 4
    assert len(scenes.NOVEL_OBJECTS) == len(scenes.OBJECTS) // 10
    layouts = {scenes.make_scene(0, "train", i).layout for i in range(60)}
    assert layouts == {"one", "count", "row", "column", "three"}


def pairs(scene):
    names = sorted(set(scene.names))
    return {(a, b) for a in names for b in names if a < b}


def test_no_pair_of_objects_is_shared_between_splits():
    seen = {
        split: set().union(*(pairs(scenes.make_scene(0, split, i)) for i in range(1500)))
        for split in ("train", "validation", "test")
    }
    pretraining = set().union(*(pairs(scenes.make_scene(9, "train", i, include_novel=True)) for i in range(1500)))
    pretraining |= set().union(
        *(pairs(scenes.make_scene(9, "train", i, include_novel=True, crowd=True)) for i in range(100))
    )
    assert all(len(found) > 100 for found in seen.values())
    assert not (seen["train"] | pretraining) & (seen["test"] | seen["validation"])
    assert not seen["test"] & seen["validation"]


def test_novel_objects_are_only_in_the_novel_split():
    for split in ("train", "validation", "test"):
        shown = {name for i in range(1500) for name in scenes.make_scene(0, split, i).names}
        assert shown == set(scenes.SEEN_OBJECTS)
    novel = [scenes.make_scene(0, "novel", i) for i in range(300)]
    assert {name for scene in novel for name in scene.names} == set(scenes.NOVEL_OBJECTS)
    assert all(scenes.pair_split(*pair) == "novel" for scene in novel for pair in pairs(scene))
    texts = [chunk for i in range(300) for text in ClassroomScenes("train")[i].texts for chunk in text]
    words = {word.strip(".,?:") for chunk in texts for word in f"{chunk.prompt} {chunk.caption}".split()}
    assert not words & scenes.NOVEL_OBJECTS


@pytest.mark.parametrize(
    "name, one, many",
    [("apple", "an apple", "apples"), ("unicorn", "a unicorn", "unicorns"), ("cherry", "a cherry", "cherries"),
     ("fox", "a fox", "foxes"), ("church", "a church", "churches"), ("monkey", "a monkey", "monkeys"),
     ("mouse", "a mouse", "mice"), ("wolf", "a wolf", "wolves"), ("sheep", "a sheep", "sheep"),
     ("tomato", "a tomato", "tomatoes"), ("bus", "a bus", "buses"), ("snowman", "a snowman", "snowmen"),
     ("jellyfish", "a jellyfish", "jellyfish"),
     ("umbrella", "an umbrella", "umbrellas")],
)  # fmt: skip
def test_articles_and_plurals(name, one, many):
    assert scenes.with_article(name) == one and scenes.plural(name) == many


def scene_of(layout, *names):
    boxes = [(32 * k, 0, 32 * k + 30, 30) for k in range(3)]
    placed = tuple(scenes.Placed(name, box) for name, box in zip(names, boxes, strict=False))
    return scenes.Scene(layout, placed, "blue", (120, 175, 250))


def test_captions_say_what_is_drawn():
    row = scene_of("row", "cat", "apple")
    assert row.caption("sentence") == "an apple to the right of a cat on a blue ground"
    assert row.caption("list") == "blue: cat, apple"
    assert row.caption("telegram") == "cat left stop apple right stop blue stop"
    assert scene_of("column", "apple", "cat").caption("sentence") == "an apple above a cat on a blue ground"
    assert scene_of("count", "fox", "fox").caption("sentence") == "two foxes on a blue ground"
    three = scene_of("three", "cat", "apple", "bus")
    assert three.caption("sentence") == "an apple between a cat and a bus on a blue ground"
    assert three.caption("story") == "once upon a time a cat, an apple and a bus met in a blue land"
    assert ("what is in the middle?", "an apple") in three.questions()
    assert ("what is to the left of the apple?", "a cat") in row.questions()
    assert ("how many foxes are there?", "two") in scene_of("count", "fox", "fox").questions()


def test_boxes_hold_the_drawing():
    for i in range(40):
        scene = scenes.make_scene(1, "train", i)
        picture = scene.draw()
        outside = picture.copy()
        for placed in scene.objects:
            left, top, right, bottom = placed.box
            assert 0 <= left < right <= scenes.IMAGE_SIZE and 0 <= top < bottom <= scenes.IMAGE_SIZE
            assert len(picture.crop(placed.box).getcolors(10_000)) > 3  # something is drawn there
            outside.paste(scene.rgb, placed.box)
        assert len(outside.getcolors()) == 1  # and nothing anywhere else


def test_documents_keep_one_style():
    several = [text for i in range(500) for text in ClassroomScenes("train")[i].texts if len(text) > 1]
    documents = [text for text in several if not is_naming(text) and not is_one_word(text)]
    assert len(documents) > 30
    for chunks in documents:
        assert [chunk.picture for chunk in chunks] == list(range(len(chunks)))
        if "Question:" in chunks[0].prompt:  # every chunk has a question of its own
            assert all("Question:" in chunk.prompt for chunk in chunks)
            continue
        assert len({chunk.prompt for chunk in chunks}) == 1
        assert len({"stop" in chunk.caption.split() for chunk in chunks}) == 1


def is_naming(text) -> bool:
    return not text[0].caption and len(text) > 1


def is_one_word(text) -> bool:
    return text[-1].prompt == scenes.ONE_WORD


def test_an_invented_name_is_shown_once_and_then_looked_up():
    texts = [text for i in range(1000) for text in ClassroomScenes("train")[i].texts if is_naming(text)]
    assert len(texts) > 10 and {len(chunks) for chunks in texts} == {5, 6, 8}
    for chunks in texts:
        names, looked_up = {c.prompt for c in chunks if c.prompt}, {c.caption for c in chunks if c.caption}
        assert looked_up <= names and len(names) == len(chunks) - 3
        assert not any(map(is_held_out, names))  # these are for tests only
        assert all(bool(c.prompt) != bool(c.caption) for c in chunks)


def test_held_out_names_are_new_but_their_syllables_are_not():
    train, held_out = (set(invented_names(random.Random(0), 300, held_out=which)) for which in (False, True))
    assert len(train) == len(held_out) == 300 and not train & held_out
    syllables = lambda names: {half for name in names for half in (name[:2], name[2:])}  # noqa: E731
    assert syllables(held_out) <= syllables(train)


def test_one_word_follows_one_rule_that_only_the_pictures_show():
    examples = ClassroomScenes("train")
    for i in range(400):
        drawn, texts = examples._plan(i)
        if not is_one_word(texts[0]):
            continue
        words = [chunk.caption for chunk in texts[0]]
        rules = [rule for rule in scenes.RULES if [scene.by_rule(rule) for scene in drawn] == words]
        assert len(rules) == 1 and len({chunk.prompt for chunk in texts[0]}) == 1


# ------------------------------------------------------------------------------------------------------ labels
def test_loss_is_on_captions_and_their_end_only():
    ids = torch.tensor([[2, 5, IMAGE, 6, 7, EOC, 8, IMAGE, 9, EOC, 4, PAD]])
    labels = caption_labels(ids, (ids != PAD).long(), IMAGE, EOC)
    assert labels.tolist() == [[-100, -100, -100, 6, 7, EOC, -100, -100, 9, EOC, -100, -100]]


def test_prompts_are_told_not_asked_and_text_without_pictures_has_no_loss():
    ids = torch.tensor([[2, IMAGE, 6, 7, EOC], [2, 5, 6, 7, 8]])
    prompt_mask = torch.tensor([[0, 0, 1, 0, 0], [0] * 5]).bool()
    labels = caption_labels(ids, torch.ones_like(ids), IMAGE, EOC, prompt_mask)
    assert labels.tolist() == [[-100, -100, -100, 7, EOC], [-100] * 5]


def test_the_end_token_may_also_be_the_padding():
    ids = torch.tensor([[IMAGE, 6, EOC, EOC, EOC]])
    labels = caption_labels(ids, torch.tensor([[1, 1, 1, 0, 0]]), IMAGE, EOC)
    assert labels.tolist() == [[-100, 6, EOC, -100, -100]]


def test_interleaved_text_is_split_at_its_tags():
    assert parse_interleaved("look: <image>a cat<|endofchunk|> and <image>a dog<|endofchunk|>") == [
        Chunk(None, "look:"), Chunk(0, "", "a cat"), Chunk(None, "and"), Chunk(1, "", "a dog"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- batching
def test_batches_are_of_similar_length_and_every_epoch_shows_everything_once():
    lengths = [random.Random(i).randint(1, 100) for i in range(640)]
    sampler = StepSampler(lengths.__getitem__, 640, batch_size=16, steps=80, seed=1)
    steps = list(sampler)
    assert len(steps) == 80 and steps == list(sampler)
    for epoch in (steps[:40], steps[40:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(640))
    assert steps[:40] != steps[40:]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in steps]
    assert sum(spread) / len(spread) < 20
    assert steps[:40] != list(StepSampler(lengths.__getitem__, 640, 16, 40, seed=2))


@pytest.mark.parametrize("steps", [10, 5000])
def test_a_run_of_any_length_leaves_the_curriculum(steps):
    train, _ = training_sets(TrainingOptions(steps=steps, batch_size=64), ModelConfig())
    assert len(train) >= steps * 64
    first = [i < sum(train.curriculum) for i in range(0, steps * 64, steps)]
    assert first[0] and not first[-1] and len(set(first)) == 2
    prompts = {
        chunk.prompt for i in range(sum(train.curriculum), sum(train.curriculum) + 60) for chunk in train[i].texts[0]
    }
    assert {"In a sentence:", "As a story:"} <= prompts


def test_scenes_say_where_their_things_stand_once_there_is_something_to_look_up():
    processor = FlamingoProcessor.from_pretrained(asset("classroom/flamingo"))
    lessons = ClassroomScenes("train", curriculum=(10, 10))
    assert not any(lessons[i].places for i in range(20))
    later = [lessons[i] for i in range(20, 60)]
    collate = Collate(processor, 192, places=True)
    batch = collate(later)
    assert batch.places.shape == (sum(len(example.places) for example in later), 3)
    ids = lambda word: processor.tokenizer(f" {word}", add_special_tokens=False).input_ids  # noqa: E731
    first = 0
    expected = []
    for example in later:
        for picture, thing, place in example.places:
            expected.append([first + picture, ids(thing)[-1], ids(place)[-1]])
        first += len(example.pictures)
    assert batch.places.tolist() == expected and batch.places[:, 0].max() < len(batch.pixel_values)
    assert {place for example in later for _, _, place in example.places} == {
        "left", "middle", "right", "above", "below",
    }  # fmt: skip
    assert batch.first(3).places is None and Collate(processor, 192)(later).places is None


def test_what_one_word_says_of_a_scene_is_where_the_scene_says_it_stands():
    scene = scene_of("three", "cat", "dog", "apple")
    assert scene.places() == [("cat", "left"), ("dog", "middle"), ("apple", "right")]
    assert scene.by_rule("left") == "cat" and scene.by_rule("right") == "apple"
    assert scene_of("one", "cat").places() == scene_of("count", "cat", "cat").places() == []


def test_examples_of_one_word_are_batched_by_themselves():
    train = ClassroomScenes("train", size=4000)
    sampler = StepSampler(train.length, len(train), batch_size=32, steps=100, seed=0)
    shares = [sum(train.texts(i)[0][0].prompt == "In a word:" for i in batch) / 32 for batch in sampler]
    assert sum(share == 1 for share in shares) >= 5 and sum(0 < share < 1 for share in shares) <= 4


def test_curriculum_come_first_once():
    steps = list(StepSampler(lambda i: 0, 64, batch_size=8, steps=16, seed=0, curriculum=(8, 8)))
    assert sorted(i for batch in steps[:2] for i in batch) == list(range(16))
    assert sorted(i for batch in steps[2:8] for i in batch) == list(range(16, 64))
    assert sorted(i for batch in steps[8:10] for i in batch) != list(range(16))
    lessons = ClassroomScenes("train", curriculum=(50, 0))
    prompts = {text[0].prompt for i in range(50) for text in lessons[i].texts}
    assert prompts == {"As a quiz:", "As a telegram:"}


# ------------------------------------------------------------------------------------------------------ loader
def photograph(path, seed=0, size=(64, 48), mode="RGB"):
    """A picture with the smooth noise of a photograph."""
    rng = random.Random(seed)
    picture = Image.effect_noise(size, 80).convert("RGB").filter(ImageFilter.GaussianBlur(2))
    ImageDraw.Draw(picture).ellipse((10, 10, 40, 40), fill=tuple(rng.randrange(256) for _ in range(3)))
    picture.convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    where = tmp_path / "pictures"
    where.mkdir()
    rows = []
    for i in range(6):
        photograph(where / f"{i}.jpg", i)
        rows.append({"file_name": f"{i}.jpg", "captions": [f"picture {i}", f"the number {i} in colour"]})
    (where / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return where


def test_a_folder_of_captioned_pictures(folder):
    splits = load_captions(str(folder))
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "validation": 2}
    example = splits["train"][0]
    assert len(example.pictures) == 1 and example.pictures[0].mode == "RGB"
    assert [len(text) for text in example.texts] == [1, 1]
    assert example.texts[1][0].caption.startswith("the number")


def test_named_splits_are_kept(folder, tmp_path):
    parent = tmp_path / "set"
    parent.mkdir()
    folder.rename(parent / "train")
    for split in ("validation", "test"):
        (parent / split).mkdir()
        photograph(parent / split / "x.png")
        (parent / split / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "captions": [split]}))
    splits = load_captions(str(parent))
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "validation": 1, "test": 1}
    assert splits["test"][0].texts[0][0].caption == "test"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files_of_paths_or_bytes(tmp_path, kind):
    rows = [{"image": f"{i}.png", "caption_0": f"first {i}", "caption_1": f"second {i}"} for i in range(4)]
    for i in range(4):
        photograph(tmp_path / f"{i}.png", i)
    source = tmp_path / f"set.{kind}"
    if kind == "jsonl":
        source.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        with open(source, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import datasets

        rows = [row | {"image": str(tmp_path / row["image"])} for row in rows]
        datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(source)
    splits = load_captions(str(source))
    assert sum(map(len, splits.values())) == 4
    assert [text[0].caption[:5] for text in splits["train"][0].texts] == ["first", "secon"]
    assert splits["train"][0].pictures[0].size == (64, 48)


def test_interleaved_documents_load(tmp_path):
    for i in range(4):
        photograph(tmp_path / f"{i}.png", i)
    text = "<image>one<|endofchunk|><image>two<|endofchunk|>"
    rows = [{"images": ["0.png", "1.png"], "text": text}, {"images": ["2.png", "3.png"], "text": text},
            {"images": ["2.png", "3.png"], "text": "<image>only one tag<|endofchunk|>"}]  # fmt: skip
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = load_captions(str(tmp_path / "set.jsonl"))
    whole = [split[i] for split in splits.values() for i in range(len(split))]
    assert len(whole) == 2 and all(len(example.pictures) == 2 for example in whole)
    assert [chunk.caption for chunk in whole[0].texts[0]] == ["one", "two"]
    assert any("1 <image> tags for 2 pictures" in line for split in splits.values() for line in split.skipped)


def test_broken_pictures_and_captions_are_left_out_and_listed(folder):
    (folder / "0.jpg").write_bytes((folder / "0.jpg").read_bytes()[:300])  # cut off
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[1]["captions"] = ["  ", "good"]
    rows[2]["captions"] = []
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = load_captions(str(folder))
    skipped = [line for split in splits.values() for line in split.skipped]
    assert sum(map(len, splits.values())) == 4
    assert any(line.startswith("0.jpg: cannot be read") for line in skipped)
    assert any(line.startswith("1.jpg: 1 caption(s)") for line in skipped)


def test_a_set_that_is_mostly_broken_is_an_error(folder):
    for i in range(5):
        (folder / f"{i}.jpg").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"only \d of \d examples can be used"):
        load_captions(str(folder))


def test_captions_that_are_numbers_are_no_captions(tmp_path):
    photograph(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": 5}] * 4
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="not text"):
        load_captions(str(tmp_path / "set.jsonl"))


def test_columns_that_cannot_be_found_are_asked_for(folder, tmp_path):
    photograph(tmp_path / "a.png")
    rows = [{"photo": "a.png", "words": f"caption {i}"} for i in range(4)]
    source = tmp_path / "set.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="--image-column"):
        load_captions(str(source))
    with pytest.raises(InputError, match="--caption-columns"):
        load_captions(str(source), image_column="photo")
    with pytest.raises(InputError, match="no column 'phrase': it has photo, words"):
        load_captions(str(source), image_column="photo", caption_columns="phrase")
    assert len(load_captions(str(source), image_column="photo", caption_columns="words")["train"]) == 2


@pytest.mark.parametrize("name, reason", [("missing/folder/here", "no such file"), ("./nowhere", "no such file"),
                                          ("nobody/nothing", "a hub name needs a network")])  # fmt: skip
def test_sources_that_are_not_there(name, reason):
    with pytest.raises(InputError, match=reason):
        load_captions(name)


def test_an_empty_folder_and_a_wrong_file(tmp_path):
    with pytest.raises(InputError, match="is empty"):
        load_captions(str(tmp_path))
    (tmp_path / "set.xlsx").write_text("x")
    with pytest.raises(InputError, match="expected a folder or a file ending in"):
        load_captions(str(tmp_path / "set.xlsx"))


def test_every_mode_becomes_rgb():
    square = Image.new("RGB", (8, 8), (200, 30, 30))
    assert to_rgb(square.convert("P")).getpixel((3, 3))[0] > 150
    assert to_rgb(square.convert("CMYK")).getpixel((3, 3))[0] > 150
    assert to_rgb(Image.new("LA", (8, 8), (0, 0))).getpixel((3, 3)) == (255, 255, 255)  # nothing on white
    assert to_rgb(Image.new("RGBA", (8, 8), (0, 0, 0, 0))).getpixel((3, 3)) == (255, 255, 255)
    assert to_rgb(Image.new("1", (8, 8), 1)).getpixel((3, 3)) == (255, 255, 255)
    sixteen = Image.new("I;16", (8, 8), 32768)
    assert abs(to_rgb(sixteen).getpixel((3, 3))[0] - 128) <= 1
