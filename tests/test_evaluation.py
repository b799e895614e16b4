"""The evaluation: controls that cannot be confused with the score, prompts, attention put back on the picture, parts
that survive a kill, and a page that a browser shows."""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from flamingo.classroom import scenes
from flamingo.classroom.invented import is_held_out
from flamingo.config import TrainingOptions
from flamingo.errors import InputError
from flamingo.evaluation import attention, controls, neighbours
from flamingo.evaluation.confusions import confusions
from flamingo.evaluation.few_shot import FewShot, check_shots, choose_examples, curve, prompt_text
from flamingo.evaluation.parts import FILE, Parts
from flamingo.evaluation.predictor import Predictor
from flamingo.evaluation.report import report_page
from flamingo.evaluation.run import plan, run_plan
from flamingo.evaluation.test_set import EvaluationSet, Item, classroom_items, classroom_test_set
from flamingo.evaluation.typical import most_typical
from flamingo.interop.backbones import build_flamingo
from flamingo.presets import model_config
from flamingo.training.checkpoint import save_model

ARGUMENTS = {"seed": 0, "shots": [0, 2], "queries": 4, "trials": 2, "demos": "random", "zero_shot": "bare",
             "template": ""}  # fmt: skip


def arguments(**changed) -> argparse.Namespace:
    return argparse.Namespace(**(ARGUMENTS | changed))


@pytest.fixture(scope="module", autouse=True)
def a_small_exam():
    """Few support pictures, few names: the machinery is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flamingo.evaluation.test_set.SUPPORT", 16)
        patch.setattr("flamingo.evaluation.run.NAMES", 5)
        patch.setattr("flamingo.evaluation.captioning.NEW_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def predictor(a_small_exam) -> Predictor:
    """The classroom's backbones under a fresh, untrained Flamingo. Never fill its bank: take `fresh`."""
    torch.manual_seed(0)
    model, processor, _ = build_flamingo(model_config(TrainingOptions()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
    return Predictor(model.eval(), processor)


@pytest.fixture
def fresh(predictor) -> Predictor:
    """The same model with an empty bank."""
    return Predictor(predictor.model, predictor.processor)


@pytest.fixture(scope="module")
def test_set(a_small_exam) -> EvaluationSet:
    return classroom_test_set(None, 6, seed=0)


@pytest.fixture(scope="module")
def result(predictor, test_set, tmp_path_factory) -> dict:
    """A whole small evaluation."""
    examined = Predictor(predictor.model, predictor.processor)
    parts = Parts(tmp_path_factory.mktemp("run"), {})
    found = run_plan(plan(test_set, examined, arguments()), examined, parts)
    return found | {"seconds": 1.0, "cost": {"device": "cpu"}, "options": {"lr": 0.1}, "config": {"lm": "opt"}}


# ------------------------------------------------------------------------------------------------------ controls
def items_of(captions: list[str]) -> list[Item]:
    return [Item(lambda: Image.new("RGB", (8, 8)), "", [caption], "1") for caption in captions]


def test_the_verdict_tells_a_model_that_looks_from_one_that_does_not():
    truths = [f"a {name} on {ground} ground" for name in ("dog", "cat", "cow", "bee") for ground in ("red", "blue")] * 3
    support = items_of(["a fox on red ground", "a bee on red ground"])
    test_set = EvaluationSet("x", "test", items_of(truths), [], support, classroom=True)
    shuffled = truths[1:] + truths[:1]
    constant = ["a dog on red ground"] * len(truths)
    said = {"own": truths, "blind": constant, "shuffled": shuffled, "constant": constant, "copy_demo": constant}
    looking = controls.score_with_controls(test_set, said | {"novel": []}, seed=0)
    assert looking["looks"] and looking["verdict"].startswith("It looks: exact match 1.000")
    assert looking["exact_match"] == 1 and looking["controls"]["shuffled"]["exact_match"]["value"] == 0
    assert looking["gain"]["blind"]["low"] > 0.5
    assert looking["metrics"]["cider_d"].keys() == {"value", "low", "high", "n", "scale"}

    # a collapsed model says the same whatever it is shown: right now and then, but never because of the picture
    collapsed = controls.score_with_controls(test_set, {name: constant for name in said} | {"novel": []}, seed=0)
    assert not collapsed["looks"] and collapsed["verdict"].startswith("Nothing shows that it looks")
    assert collapsed["exact_match"] > 0


def test_a_copied_example_is_never_the_right_caption(test_set):
    assert all(
        said not in item.truths
        for said, item in zip(controls.copied_captions(test_set, 0), test_set.items, strict=True)
    )
    said = controls.copied_captions(test_set, 0)
    assert said == controls.copied_captions(test_set, 0) != controls.copied_captions(test_set, 1)
    assert len(set(controls.constant_captions(test_set))) == len({item.style for item in test_set.items})


def test_neighbours_captions_are_those_of_the_pictures_most_alike():
    support = [Item(Image.new("RGB", (8, 8)), "", captions, "1") for captions in (
        ["a cat sleeps"], ["two dogs run", "a dog runs on grass"], ["a dog runs", "a brown dog runs on grass"],
        ["a red car"], ["a house"], ["a tree"], ["a boat on the sea"],
    )]  # fmt: skip
    vectors = torch.nn.functional.one_hot(torch.arange(7), 8).float()
    vectors[:, 7] = torch.tensor([0.0, 0.9, 0.8, 0.1, 0.1, 0.1, 0.0])  # how much of a dog is in it
    dog = torch.nn.functional.normalize(torch.tensor([[0.0, 0.5, 0, 0, 0, 0, 0, 1]]), dim=-1)
    found = neighbours.captions_of_neighbours(dog, vectors, support)
    assert found == {"nearest": ["two dogs run"], "typical": ["a dog runs on grass"]}
    assert most_typical(["a house", "a dog runs", "a dog runs fast"]) == "a dog runs"


def test_evaluation_json_has_every_key_it_promises(result):
    assert result.keys() >= {
        "n", "exact_match", "exact_match_blind", "exact_match_shuffled", "exact_match_novel", "by_objects", "metrics",
        "controls", "exact_match_style_given", "shots", "fast_binding", "attention_hit_rate", "seconds", "verdict",
    }  # fmt: skip
    assert result["controls"].keys() == {"blind", "shuffled", "constant", "copy_demo"}
    assert result["shots"].keys() == {"0", "2"}
    for row in result["shots"].values():
        for name in ("exact_match", "exact_match_novel", "text_only_demos"):
            assert 0 <= row[name] <= 1 and row[f"{name}_spread"] >= 0
    assert result["shots"]["0"]["trials"] == 1 and result["shots"]["2"]["trials"] == 2
    assert result["fast_binding"]["chance"] == 0.5 and result["fast_binding"]["n"] == 4
    assert result["classification"]["chance"] == 1 / result["classification"]["names"]
    assert len(result["examples"]) == result["n"] == 6
    json.dumps(result, allow_nan=False)


def test_pictures_are_encoded_once(test_set):
    """Controls, shots, trials and tasks share one bank; only the resampler's attention asks for some again."""
    torch.manual_seed(0)
    model, processor, _ = build_flamingo(model_config(TrainingOptions()))
    examined, encoded = Predictor(model, processor), []
    model.vision_encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    todo = plan(test_set, examined, arguments(shots=[0, 1]))
    task = todo.tasks["captions"]
    for shots in (1, 2):
        said = examined.predict(
            [prompt_text(task.queries[0], [task.solve(task.support[0], task.queries[0])] * shots)], "x"
        )
        assert len(said) == 1
    assert sum(encoded) == len(examined.pictures)


# ------------------------------------------------------------------------------------------------------- prompts
def test_a_prompt_of_shots_is_one_document(fresh, test_set):
    task = plan(test_set, fresh, arguments(template="Output:")).tasks["captions"]
    query = task.queries[0]
    examples = [task.solve(row, query) for row in task.support[:2]]
    ids, _ = fresh.processor.encode_chunks(prompt_text(query, examples), open_end=True)
    text = fresh.processor.tokenizer.decode(ids)
    one, two = (example.caption for example in examples)
    expected = f"<image> Output: {one}<|endofchunk|><image> Output: {two}<|endofchunk|><image> Output:"
    assert text.removeprefix("</s>") == expected
    # texts only: the same without the pictures and tags of the examples; each example is still closed
    bare, _ = fresh.processor.encode_chunks(prompt_text(query, examples, "text_only_demos"), open_end=True)
    image = fresh.processor.media_token_id
    assert bare.count(image) == 1 and bare.count(fresh.processor.eoc_token_id) == 2
    assert [i for i in ids if i != image] == [i for i in bare if i != image]


def test_examples_are_told_in_the_querys_style_and_never_give_it_away(fresh, test_set):
    task = plan(test_set, fresh, arguments()).tasks["captions"]
    chosen = choose_examples(task, 3, FewShot([3]), 0, fresh)
    for query, examples in zip(task.queries, chosen, strict=True):
        assert len(examples) == 3 and len({example.picture for example in examples}) == 3
        assert all(example.prompt == "" and example.caption not in query.truths for example in examples)
    assert chosen == choose_examples(task, 3, FewShot([3]), 0, fresh)
    assert chosen != choose_examples(task, 3, FewShot([3]), 1, fresh)
    # fewer shots are the last of more, so a curve compares like with like
    assert [own[-1:] for own in chosen] == choose_examples(task, 1, FewShot([3]), 0, fresh)


def test_rices_takes_the_most_similar_pictures_and_puts_the_best_last(fresh, test_set):
    task = plan(test_set, fresh, arguments()).tasks["captions"]
    query, (examples, *_) = task.queries[0], choose_examples(task, 4, FewShot([4], demos="rices"), 0, fresh)
    likeness = [(fresh.pooled[example.picture] @ fresh.pooled[query.row]).item() for example in examples]
    assert likeness == sorted(likeness)
    others = fresh.pooled[list(set(task.support) - {example.picture for example in examples})] @ fresh.pooled[query.row]
    assert sum(value > likeness[0] for value in others.tolist()) <= 1  # one may have been the query's own caption


def test_a_model_that_follows_its_examples_is_found_out(fresh, test_set, tmp_path):
    """An answerer that knows every picture but takes the style from the last example: the curve must rise to 1."""
    task = plan(test_set, fresh, arguments()).tasks["captions"]
    by_row = {
        query.row: scene for query, scene in zip(task.queries, (item.scene for item in test_set.items), strict=False)
    }
    support = dict(zip(task.support, (item.scene for item in test_set.support), strict=True))

    class Follower:
        pooled = None

        def predict(self, texts, title, blind=False):
            def style_of(example):
                return next(s for s in scenes.STYLES if support[example.picture].caption(s) == example.caption)

            seen = [[chunk for chunk in text[:-1] if chunk.picture is not None] for text in texts]
            styles = [style_of(examples[-1]) if examples else "sentence" for examples in seen]
            return [by_row[text[-1].picture].caption(style) for text, style in zip(texts, styles, strict=True)]

    table = curve(task, FewShot([0, 1, 2], trials=2), Follower(), Parts(tmp_path, {}))
    assert table["0"]["exact_match"] == 1 / 4 and table["1"]["exact_match"] == table["2"]["exact_match"] == 1
    assert table["2"]["text_only_demos"] == 1 / 4  # it reads styles off examples with pictures only


def test_zero_shots_may_mean_two_texts(fresh, test_set, tmp_path):
    task, asked = plan(test_set, fresh, arguments()).tasks["captions"], []

    class Listener:
        pooled = None

        def predict(self, texts, title, blind=False):
            asked.extend(texts)
            return [""] * len(texts)

    curve(task, FewShot([0], zero_shot="two-texts"), Listener(), Parts(tmp_path, {}))
    assert asked and all([chunk.picture is None for chunk in text] == [True, True, False] for text in asked)


def test_fast_binding_shows_each_thing_once_and_asks_about_another_picture_of_it(fresh, test_set):
    todo = plan(test_set, fresh, arguments(queries=50))
    rows = {}
    for ways in (2, 5):
        for episode in todo.episodes[f"fast binding_novel {ways}"]:
            assert len(set(episode.names)) == len(episode.shown) == ways and all(map(is_held_out, episode.names))
            assert episode.asked not in episode.shown
            rows[episode.asked] = episode
            text = fresh.processor.encode_chunks(episode.text(), open_end=True)[0]
            assert text[-1] == fresh.processor.media_token_id and text.count(fresh.processor.eoc_token_id) == ways
        assert len({episode.right for episode in todo.episodes[f"fast binding_novel {ways}"]}) > 1


def test_words_are_found_again_in_tokens(predictor, test_set):
    item = test_set.items[0]
    caption = "a hedgehog on a purple ground"
    looks = attention.word_looks(predictor.model, predictor.processor, [item.picture], [item.prompt], [caption])
    assert [look.word for look in looks] == caption.split()
    assert all(look.grid.shape == (6, 6) and look.grid.sum().item() == pytest.approx(1, abs=1e-4) for look in looks)


# --------------------------------------------------------------------------------------------------------- parts
def test_finished_parts_are_not_done_again(tmp_path, capsys):
    first = Parts(tmp_path, {"n": 5})
    first.keep("one", lambda: ["a"])
    with pytest.raises(KeyboardInterrupt):
        first.keep("two", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    again = Parts(tmp_path, {"n": 5})
    assert "1 parts are done" in capsys.readouterr().err
    assert again.keep("one", lambda: pytest.fail("done before")) == ["a"]
    assert again.keep("two", lambda: (1, 2)) == [1, 2]
    again.finish()
    assert list(tmp_path.iterdir()) == []


def test_changed_arguments_and_damaged_parts_start_anew(tmp_path, capsys):
    Parts(tmp_path, {"n": 5}).keep("one", lambda: "old")
    assert Parts(tmp_path, {"n": 6}).keep("one", lambda: "new") == "new"
    assert "starting anew" in capsys.readouterr().err
    (tmp_path / FILE).write_text("{")
    assert Parts(tmp_path, {"n": 6}).keep("one", lambda: "newer") == "newer"
    assert "cannot be read" in capsys.readouterr().err


def test_a_killed_evaluation_ends_as_one_that_was_not(predictor, test_set, result, tmp_path, monkeypatch):
    """Stopped in the middle of the few-shot part; everything before is kept."""
    examined = Predictor(predictor.model, predictor.processor)
    predict, calls = Predictor.predict, []

    def stop_at_six(self, texts, title, **control):
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(title)
        return predict(self, texts, title, **control)

    monkeypatch.setattr(Predictor, "predict", stop_at_six)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan(test_set, examined, arguments()), examined, Parts(tmp_path, {}))
    done, calls[:] = list(calls), []
    monkeypatch.setattr(
        Predictor, "predict", lambda self, texts, title, **c: calls.append(title) or predict(self, texts, title, **c)
    )
    examined = Predictor(predictor.model, predictor.processor)
    found = run_plan(plan(test_set, examined, arguments()), examined, Parts(tmp_path, {}))
    assert len(done) == 6 and not set(done) & set(calls)
    for name in ("metrics", "controls", "shots", "fast_binding", "examples"):
        assert found[name] == result[name]


# ----------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def run_folder(predictor, tmp_path_factory) -> Path:
    """What train.py leaves behind, without the training."""
    folder = tmp_path_factory.mktemp("runs") / "untrained"
    folder.mkdir()
    config = model_config(TrainingOptions())
    save_model(folder, predictor.model, predictor.processor, config)
    summary = {"seconds": 1.0, "device": "cpu", "dtype": "float32", "options": dataclasses.asdict(TrainingOptions())}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def captioned_folder(folder: Path, splits: dict[str, int], captionless: str | None = None) -> Path:
    """Plain pictures in the imagefolder layout, two captions each, except none for one picture."""
    for split, count in splits.items():
        (folder / split).mkdir(parents=True)
        rows = []
        for i in range(count):
            name = f"{split}{i}.png"
            Image.new("RGB", (40, 30), (20 * i % 255, 90, 120)).save(folder / split / name)
            captions = [] if name == captionless else [f"a {split} picture of shade {i}", f"shade {i}"]
            rows.append(json.dumps({"file_name": name, "captions": captions}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def run_command(*words) -> None:
    evaluate.main(evaluate.parse([*map(str, words), "--device", "cpu"]))


def test_training_captions_help_to_choose(run_folder, tmp_path, capsys):
    data = captioned_folder(tmp_path / "set", {"train": 8, "test": 3})
    texts = ["two red boats", "red boats at sea"], ["a green tree", "green trees in a tree"]
    rows = [{"file_name": f"train{i}.png", "captions": texts[i % 2]} for i in range(8)]
    (data / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_command(run_folder, "--data", data, "--shots")
    plain = json.loads((run_folder / "evaluation.json").read_text())
    run_command(run_folder, "--data", data, "--shots", "--consensus")
    result = json.loads((run_folder / "evaluation.json").read_text())
    assert result["controls"].keys() - plain["controls"].keys() == {"consensus"}
    for name in ("blind", "constant", "nearest"):  # of a picture that is taken away nothing can be expected
        assert result["controls"][name] == plain["controls"][name]
    said, before = ([entry["said"] for entry in found["examples"]] for found in (result, plain))
    assert said != before and any(
        "boat" in text or "tree" in text for text in said
    )  # an untrained model's own captions are nonsense
    assert "the best training caption" in result["verdict"] and "consensus" in capsys.readouterr().out
    with pytest.raises(InputError, match="no two classroom scenes are of one kind"):
        run_command(run_folder, "--consensus")
    with pytest.raises(InputError, match="draws candidates of its own"):
        run_command(run_folder, "--data", data, "--consensus", "--candidates", 4)


def test_a_captioned_set_is_examined(run_folder, tmp_path, capsys):
    data = captioned_folder(tmp_path / "set", {"train": 6, "test": 4})
    run_command(run_folder, "--data", data, "--shots", 0, 2, "--template", "Output:", "--trials", 1)
    result = json.loads((run_folder / "evaluation.json").read_text())
    assert result["n"] == 4 and result["exact_match_novel"] is None and result["split"] == "test"
    assert result["shots"]["2"].keys() >= {"exact_match", "text_only_demos", "cider_d", "cider_d_text_only_demos"}
    assert result["shots"]["2"]["exact_match_novel"] is None and "fast_binding" not in result
    assert (
        result["few_shot"]["template"] == "Output:" and result["few_shot"]["support"] == 4
    )  # 2 of 6 lent for validation
    assert result["headline_metric"] == "CIDEr-D" and result["attention_hit_rate"] is None
    assert result["controls"].keys() == result["gain"].keys() > {"nearest", "typical", "blind"}
    assert all({"low", "high"} < control["bleu_4"].keys() for control in result["controls"].values())
    out = capsys.readouterr().out
    assert "cider_d" in out and "WRONG" not in out and "the nearest picture's caption" in out
    report = (run_folder / "report.html").read_text()
    assert 'graded" style="--grade: ' in report
    assert "better half" in (run_folder / "report.html").read_text()
    assert [path.name for path in run_folder.iterdir() if path.name.startswith(".")] == []
    assert 'alt=""' in report and "CIDEr-D 0." in report
    run_command(run_folder, "--data", data, "--split", "validation", "--shots")  # no number: no few-shot
    result = json.loads((run_folder / "evaluation.json").read_text())
    assert result["shots"] == {} and result["split"] == "validation"


@pytest.mark.parametrize("words, reason", [
    (["--n", "1"], "--n must be at least 2"),
    (["--shots", "-1"], "--shots must not be negative"),
    (["--shots", "two"], "invalid int value"),
    (["--trials", "0"], "--trials must be at least 1"),
    (["--demos", "best"], "invalid choice: 'best'"),
])  # fmt: skip
def test_mistakes_in_options(words, reason):
    with pytest.raises(InputError, match=reason):
        evaluate.parse(["run", *words])


def test_mistakes_are_said_before_anything_runs(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Predictor, "predict", lambda *_, **__: pytest.fail("something was run"))
    before = sorted(path.name for path in run_folder.iterdir())
    data = captioned_folder(tmp_path / "set", {"train": 6, "test": 3})
    cases = [
        (["--split", "exam"], r"the classroom has no split 'exam': choose one of train, validation, test, novel"),
        (["--data", data, "--split", "exam"], r"has no split 'exam': it has .*test"),
        (["--data", data, "--shots", "7"], r"--shots 7 asks for more examples than there are pictures.* has 4\b"),
        (["--shots", "0", "40", "--n", "4"], r"--shots 40 asks for more examples than there are pictures.* has 16"),
        (["--data", captioned_folder(tmp_path / "gap", {"train": 4, "test": 3}, captionless="test1.png")],
         r"1 picture\(s\) of .*gap \(test\) have no reference caption \(the first: test1.png\)"),
        (["--data", captioned_folder(tmp_path / "one", {"train": 4, "test": 1})], "has 1 test picture"),
        (["--data", tmp_path / "nowhere"], "no such file or folder"),
        (["--device", "tpu9"], "device 'tpu9' cannot be used here"),
    ]  # fmt: skip
    for words, reason in cases:
        with pytest.raises(InputError, match=reason) as caught:
            evaluate.main(evaluate.parse([str(run_folder), *map(str, words)]))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"is no finished run: it has no summary.json"):
        evaluate.main(evaluate.parse([str(tmp_path)]))
    assert sorted(path.name for path in run_folder.iterdir()) == before


def test_the_number_of_shots_that_fits_does_fit(fresh, test_set):
    """The number in the sentence must itself be accepted, and leave room for the answer."""
    test_set = replace(test_set, support=classroom_items("train", 60, seed=1))
    task = plan(test_set, fresh, arguments(shots=[1])).tasks["captions"]
    with pytest.raises(InputError, match="--shots 50 does not fit: the language model has 512 positions") as caught:
        check_shots(task, FewShot([50]), fresh)
    fit = int(re.search(r"at most (\d+) shots", str(caught.value)).group(1))
    check_shots(task, FewShot([fit]), fresh)
    longest = max(
        len(fresh.processor.encode_chunks(prompt_text(query, examples), open_end=True)[0])
        for query, examples in zip(task.queries, choose_examples(task, fit, FewShot([fit]), 0, fresh), strict=True)
    )
    assert fit > 8 and longest + 8 <= 512


def test_of_the_usual_shots_those_that_fit_are_kept(fresh, test_set):
    assert plan(test_set, fresh, arguments(shots=None)).how.shots == [0, 1, 2, 4, 8]
    few = EvaluationSet("x", "test", items_of(["a", "b"]), [], items_of(["c", "d", "a"]))
    assert plan(few, Predictor(fresh.model, fresh.processor), arguments(shots=None)).how.shots == [0, 2]
    with pytest.raises(InputError, match=r"--shots 3 asks for more .* at most 2 \(captions\)"):  # "a" gives it away
        plan(few, Predictor(fresh.model, fresh.processor), arguments(shots=[3]))


# -------------------------------------------------------------------------------------------------------- report
class Page(HTMLParser):
    """What a page refers to, and its tags."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


def test_the_report_stands_alone_and_escapes_what_people_wrote(result, test_set):
    nasty = "<script>alert(1)</script> & $x$"
    examples = [dict(result["examples"][0], said=nasty), *result["examples"][1:]]
    looked = {"item": 0, "word": "dog", "grid": [[0.1] * 6] * 6}  # an untrained model may not have said one word
    attention = result["attention"] | {"examples": [looked]}
    text = report_page("run", test_set, result | {"examples": examples, "attention": attention})
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "&lt;script&gt;" in text
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text) and "@import" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    for words in (
        "Scores beside their controls",
        "Few-shot",
        "Attention",
        "Gallery",
        "Cost",
        escape(result["verdict"]),
    ):
        assert words in text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def browse(folder: Path, page: str, *options: str) -> str:
    (folder / "report.html").write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
               f"--user-data-dir={folder}/profile", *options, f"file://{folder}/report.html"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
def test_a_browser_shows_the_report_on_a_phone_and_its_filter_works(result, test_set, tmp_path):
    """The page is measured by a script that this test adds; the page itself has none."""
    right = [dict(example, right=i == 0) for i, example in enumerate(result["examples"])]
    page = report_page("run", test_set, result | {"examples": right})
    probe = """<script>addEventListener('load', () => {
        const cards = kind => [...document.querySelectorAll('input ~ .cards .' + kind)];
        const shown = kind => cards(kind).filter(card => card.offsetHeight).length;
        const out = {inner: innerWidth, wide: document.documentElement.scrollWidth,
          pictures: [...document.images].every(i => i.complete && i.naturalWidth > 0)};
        for (const id of ['all', 'only-right', 'only-wrong']) {
          document.querySelector('label[for=' + id + ']').click();
          out[id] = [shown('right'), shown('wrong')];
        }
        document.title = JSON.stringify(out);
    });</script>"""
    measured = page.replace("</body>", f"{probe}</body>").replace(' loading="lazy"', "")
    dom = browse(tmp_path, measured, "--window-size=500,900", "--virtual-time-budget=5000", "--dump-dom")
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))
    assert seen["pictures"] and seen["wide"] <= seen["inner"] <= 500  # nothing sticks out sideways
    assert seen["all"] == [1, 5] and seen["only-right"] == [1, 0] and seen["only-wrong"] == [0, 5]
    browse(tmp_path, page, "--window-size=500,900", f"--screenshot={tmp_path}/phone.png")
    with Image.open(tmp_path / "phone.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10  # not an empty page


def test_a_wrong_caption_is_filed_under_what_is_wrong_in_it():
    scene = scenes.composed(random.Random(0), "row", ("apple", "cat"), "blue")
    truth = scene.caption("quiz")
    assert truth == "what? an apple and a cat. how many? two. which ground? blue."
    wrong = {
        "objects": "what? an apple and a dog. how many? two. which ground? blue.",
        "places": "what? a cat and an apple. how many? two. which ground? blue.",
        "counts": "what? two cats. how many? two. which ground? blue.",
        "articles": "what? a apple and a cat. how many? two. which ground? blue.",
    }
    for kind, caption in wrong.items():
        found = confusions([scene], [truth], [caption])
        assert [name for name, counter in found.items() if counter] == [kind], caption
    assert not any(confusions([scene], [truth], [truth]).values())
