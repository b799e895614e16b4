"""The page's model and tabs, without a browser (test_demo_page.py drives them with one)."""

import random
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import committed_evaluation
from PIL import Image

gr = pytest.importorskip("gradio", reason="the page needs requirements-demo.txt")

from flamingo.classroom import scenes  # noqa: E402
from flamingo.data.chunks import MEDIA_TOKEN  # noqa: E402
from flamingo.demo import __main__ as command  # noqa: E402
from flamingo.demo import caption, gates, looks, parts, sees, shots, story  # noqa: E402
from flamingo.demo.model import DemoModel  # noqa: E402
from flamingo.demo.page import page  # noqa: E402
from flamingo.errors import InputError  # noqa: E402
from flamingo.evaluation.attention import View  # noqa: E402
from flamingo.figures.heat_map import SIDE, heat_map  # noqa: E402

CUE = "In a sentence:"
ROW = parts.surprise(layout="row", rng=random.Random(7))
ONE = parts.surprise(layout="one", rng=random.Random(4))


@pytest.fixture(scope="module")
def demo():
    return DemoModel(story.COMMITTED, "cpu")


# ------------------------------------------------------------------------------------------------------ captions
def test_a_caption_grows_token_by_token_and_is_right(demo):
    pieces = list(demo.stream(ROW.picture, CUE))
    assert pieces[-1] == ROW.scene.caption("sentence") and len(set(pieces)) >= 8
    assert all(pieces[-1].startswith(piece) for piece in pieces)
    assert demo.caption(ROW.picture, CUE, num_beams=3) == pieces[-1]


def test_a_seed_repeats_a_sample(demo):
    draw = lambda seed: demo.caption(ROW.picture, "", seed=seed, do_sample=True, temperature=2.0)  # noqa: E731
    assert draw(1) == draw(1) and len({draw(seed) for seed in range(5)}) > 1


def test_the_likeliest_tokens_of_a_step_contain_the_greedy_one(demo):
    said = demo.caption(ROW.picture, CUE)
    steps = demo.steps(ROW.picture, CUE, said)
    assert "".join(step.token for step in steps).replace("·", " ") == f" {said}<|endofchunk|>"
    assert all(step.likeliest[0] == (step.token, step.probability) and len(step.likeliest) == 5 for step in steps)
    shown = caption.steps_html(steps)
    assert shown.count('class="step"') == len(steps) and "&lt;|endofchunk|&gt;" in shown


def test_ten_questions_at_once_get_their_own_answers(demo):
    asked = [parts.surprise(layout="one", rng=random.Random(i)) for i in range(10)]
    closed = [(0.0, 0.0)] * len(demo.about.trained)
    alone = [demo.caption(one.picture, CUE, closed if i % 2 else None) for i, one in enumerate(asked)]
    together = [""] * len(asked)

    def ask(i):
        together[i] = demo.caption(asked[i].picture, CUE, closed if i % 2 else None)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone and len(set(alone[::2])) == 5


def test_a_visitor_who_leaves_in_mid_sentence_does_not_hold_the_model(demo):
    leaving = demo.stream(ROW.picture, CUE)
    next(leaving)
    assert demo.caption(ONE.picture, CUE) == ONE.scene.caption("sentence")


def test_who_waits_is_told_of_whatever_ends_the_answer(demo, monkeypatch):
    class Panic(BaseException):
        """As tokenizers have it, which are no Python."""

    def panic(*_):
        raise Panic

    with monkeypatch.context() as patched, pytest.raises(Panic):
        patched.setattr(demo.processor, "decode_captions", panic)
        demo.caption(ONE.picture, CUE)
    assert demo.caption(ONE.picture, CUE) == ONE.scene.caption("sentence")


@pytest.mark.parametrize("prompt, reason", [
    (f"{MEDIA_TOKEN} and {MEDIA_TOKEN}", "without <image>"), ("cat " * 600, "positions"),
])  # fmt: skip
def test_a_prompt_that_cannot_be_read_is_a_sentence_and_the_model_goes_on(demo, prompt, reason):
    with pytest.raises(ValueError, match=reason):
        demo.caption(ROW.picture, prompt)
    assert demo.caption(ROW.picture, CUE) == ROW.scene.caption("sentence")


# ------------------------------------------------------------------------------------------------------ pictures
def test_a_composed_scene_shows_what_was_chosen(demo):
    shown = parts.compose(["guitar", "tomato"], "column", "green")
    assert shown.scene.names == ["guitar", "tomato"] and shown.scene.ground == "green"
    assert demo.caption(shown.picture, "As a list:") == "green: guitar, tomato"
    assert 2 <= len(parts.compose(["dog"], "count", "blue").scene.names) <= 3
    for things, layout in (([], "one"), (["cat"], "row"), (["cat", "dog"], "count"), (["cat", "dog"], "three")):
        with pytest.raises(InputError, match="choose"):
            parts.compose(things, layout, "blue")


def test_held_out_scenes_are_marked():
    novel = sorted(scenes.NOVEL_OBJECTS)[0]
    assert f"never showed {scenes.with_article(novel)}" in parts.compose([novel], "one", "blue").note
    pairs = {scenes.pair_split("cat", other): other for other in scenes.SEEN_OBJECTS if other != "cat"}
    assert "held out" in parts.compose(["cat", pairs["test"]], "row", "blue").note
    assert "held out" not in parts.compose(["cat", pairs["train"]], "row", "blue").note


def test_an_upload_that_is_no_picture_or_too_large_is_a_sentence(tmp_path):
    (tmp_path / "none.png").write_text("no picture")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "huge.png")
    for name, reason in (("none.png", "cannot be read as a picture"), ("huge.png", "pixels")):
        file = parts.picture_file().preprocess(SimpleNamespace(path=str(tmp_path / name)))
        with pytest.raises(gr.Error, match=reason):
            parts.sentences(parts.opened)(file)
    Image.new("LA", (40, 30), (9, 99)).save(tmp_path / "fine.png")
    assert parts.opened(str(tmp_path / "fine.png")).picture.size == (40, 30)


# ----------------------------------------------------------------------------------------------- looks and gates
def test_each_word_has_a_heat_map_and_layers_and_heads_differ(demo):
    said = ROW.scene.caption("sentence")
    views = [View(), View(layer=0), View(layer=1), View(head=0)]
    found = [demo.looks(ROW.picture, CUE, said, view) for view in views]
    assert [look.word for look in found[0]] == re.findall(r"\w+", said)
    assert len({tuple(each[0].grid.flatten().tolist()) for each in found}) == len(views)
    word = [look.word for look in found[0]].index(ROW.scene.names[0])
    boxed, bare = (heat_map(ROW.picture, found[0][word], scene) for scene in (ROW.scene, None))
    assert boxed.size == (SIDE, SIDE) and boxed.tobytes() != bare.tobytes()
    left, top, *_ = (side * SIDE // scenes.IMAGE_SIZE for side in ROW.scene.objects[0].box)
    assert boxed.getpixel((left + 1, top + 1)) == (255, 255, 255)


def test_with_all_gates_closed_it_is_the_language_model_bit_for_bit_and_blind(demo):
    said, closed = ROW.scene.caption("sentence"), [(0.0, 0.0)] * len(demo.about.trained)
    assert demo.distance_to_language_model(ROW.picture, CUE, said, closed) == 0.0
    assert demo.distance_to_language_model(ROW.picture, CUE, said) > 1
    seeing, blind = demo.losses(ROW.picture, CUE, said, closed)
    assert seeing == blind
    assert demo.caption(ROW.picture, CUE, closed) == demo.caption(ONE.picture, CUE, closed) != said
    shown = gates.result_html("x", seeing, blind, said, "the right caption", 0.0)
    assert "bit for bit" in shown
    seeing, blind = demo.losses(ROW.picture, CUE, said)
    assert seeing < 0.5 < blind


def test_gates_are_as_trained_again_whatever_happened_meanwhile(demo):
    before = demo.model.gates()
    for opened in (1.0, -1.0, 0.5):
        demo.losses(ROW.picture, CUE, "a cat", [(opened, opened)] * len(demo.about.trained))
    with pytest.raises(ValueError):
        demo.caption(ROW.picture, "cat " * 600, [(0.0, 0.0)] * len(demo.about.trained))
    assert demo.model.gates() == before == demo.about.trained
    assert demo.caption(ROW.picture, CUE) == ROW.scene.caption("sentence")


# ------------------------------------------------------------------------------------- who sees what, few-shot
def test_the_mask_is_drawn_and_the_text_continued(demo):
    shown, text = sees.began(random.Random(3))
    seen, continued = demo.who_sees_what(text, [each.picture for each in shown])
    first = seen.tokens.index(MEDIA_TOKEN)
    assert not any(map(any, seen.mask[:first])) and seen.mask[first] == [True, False]
    assert seen.mask[-1] == [False, True]
    assert continued == shown[1].scene.caption("list")
    _, swapped = demo.who_sees_what(text, [each.picture for each in shown[::-1]])
    assert swapped == shown[0].scene.caption("list")
    table = sees.mask_html(seen, shown)
    assert table.count("<tr>") == len(seen.tokens) + 1 and table.count("sees</td>") == sum(map(sum, seen.mask))
    left, rest = sees.without_last(shown, text)
    assert len(left) == 1 == rest.count(MEDIA_TOKEN)
    seen, _ = demo.who_sees_what(rest, [each.picture for each in left])
    assert seen.mask[0] == [False] and seen.mask[-1] == [True]
    seen, _ = demo.who_sees_what("once upon a time", [])
    assert seen.mask == [[]] * len(seen.tokens)


def test_the_text_is_about_the_last_picture(demo):
    right = 0
    for i in range(10):
        shown, text = sees.began(random.Random(i))
        for order in (shown, shown[::-1]):
            right += demo.who_sees_what(text, [each.picture for each in order])[1] == order[1].scene.caption("list")
    assert right >= 17  # of 20: no model is always right


@pytest.mark.parametrize("text, pictures, reason", [
    ("<image> <image> <image>", 2, "3 &lt;image&gt; tags but 2 pictures"), ("a cat", 1, "0 &lt;image&gt; tags but 1"),
    ("<image> a", 0, "1 &lt;image&gt; tokens but 0 pictures"), ("<image>" + " cat" * 600, 1, "positions"),
])  # fmt: skip
def test_texts_and_pictures_that_disagree_are_a_sentence(demo, text, pictures, reason):
    with pytest.raises(gr.Error, match=reason):
        parts.sentences(demo.who_sees_what)(text, [ROW.picture] * pictures)


def test_the_style_follows_the_examples(demo):
    for style in ("story", "telegram"):
        asked = shots.by_style(style, random.Random(5))
        said = shots.predictions(demo, asked)
        assert said[""] == asked.right and list(said) == list(shots.WAYS)
    without = shots.Prompt((), asked.query)
    assert list(shots.predictions(demo, without)) == [""]
    assert list(shots.predictions(demo, shots.Prompt(asked.examples[:1], asked.query))) == ["", "text_only_demos"]


def test_invented_names_are_bound_to_pictures(demo):
    right = shuffled = 0
    for i in range(8):
        asked = shots.by_name(2, random.Random(i))
        said = shots.predictions(demo, asked)
        right += said[""] == asked.right
        shuffled += said["shuffled_demos"] == asked.right
    assert right >= 6 > shuffled
    assert "✓" in shots.result_html({"": "zuki"}, "zuki") and "✗" in shots.result_html({"": "tavo"}, "zuki")


@pytest.mark.parametrize("name", shots.READY)
def test_ready_made_examples_can_be_predicted(demo, name):
    asked = shots.READY[name](random.Random(1))
    assert asked.right and asked.query.picture.size == (96, 96)
    assert all(shots.predictions(demo, asked).values())


# ---------------------------------------------------------------------------------------------------- a run's story
def test_the_story_of_the_committed_run():
    losses, opened, validations = story.curves(story.COMMITTED)
    assert {"training", "validation", "validation, picture taken away"} == set(losses["of"])
    assert {"attn 1", "ff 2"} < set(opened["of"]) and len(validations) == 10
    score = f"{committed_evaluation()['exact_match']:.3f}"
    scores = story.scores(story.COMMITTED)
    assert scores["exact match"] == score and "It looks" in scores["verdict"]
    assert score in story.table_html({story.COMMITTED: scores, story.Path("other"): {}})


def test_samples_over_time_are_shown_by_step(tmp_path):
    entries = [{"step": step, "samples": [[said, "a cat"]]} for step, said in ((2, "a <b>dog"), (4, "a cat"))]
    shown = story.samples_html(tmp_path, entries)
    assert shown.index("a &lt;b&gt;dog") < shown.index("<td>4</td><td>a cat</td>")
    assert "kept no samples" in story.samples_html(tmp_path, [{"step": 2, "samples": "?"}])


def test_a_half_written_run_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        story.curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 1')
    with pytest.raises(InputError, match="line 1"):
        story.curves(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        story.scores(tmp_path)
    with pytest.raises(InputError, match=r"config\.json"):
        DemoModel(tmp_path)


# ---------------------------------------------------------------------------------------------------------- the page
@pytest.mark.parametrize("tab", [caption, looks, gates, sees, shots, story])
def test_the_code_of_a_tab_runs(tab, capsys):
    assert 8 <= len(tab.CODE.strip().splitlines()) <= 13
    exec(tab.CODE.replace("RUN", repr(str(story.COMMITTED))), {})
    assert capsys.readouterr().out.strip()


def test_the_page_has_its_tabs_and_a_model_without_their_parts_a_sentence(demo, monkeypatch):
    made = page(demo).get_config_file()
    tabs = [each["props"]["label"] for each in made["components"] if each["type"] == "tabitem"]
    assert tabs == ["Caption", "Where it looks", "Gates", "Who sees what", "Few-shot", "A run's story"]
    without = replace(demo.about, trained=[], can_show_attention=False, has_media_mask=False)
    monkeypatch.setattr(demo, "about", without)
    told = " ".join(str(each["props"].get("value")) for each in page(demo).get_config_file()["components"])
    assert "has no gates" in told and "no attention of that kind" in told and "own causal mask" in told


def test_a_port_in_use_is_passed_over():
    with command.socket.socket() as taken:
        taken.bind((command.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert command.free_port(port) > port
    with pytest.raises(InputError, match="no port"):
        command.free_port(65536)
