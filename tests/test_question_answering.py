"""Questions and classes of a captioned set: found in every form, scored as by hand, asked with and without pictures."""
# ruff: noqa: F811 (fixtures of another file are arguments here)

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluation import a_small_exam, fresh, predictor, run_command, run_folder  # noqa: F401 (fixtures)

from flamingo.config import TrainingOptions
from flamingo.data.answer_columns import (
    AnswerColumns,
    Question,
    each_name_in_turn,
    find_answer_columns,
    questions_of_row,
)
from flamingo.data.captions import load_captions
from flamingo.data.chunks import Chunk
from flamingo.errors import InputError
from flamingo.evaluation.answer_tasks import classes_of_set, questions_of_set
from flamingo.evaluation.few_shot import FewShot, choose_examples, curve
from flamingo.evaluation.parts import Parts
from flamingo.evaluation.predictor import Predictor
from flamingo.evaluation.test_set import EvaluationSet, Item, captioned_test_set


def picture(shade: int = 0) -> Image.Image:
    return Image.new("RGB", (12, 9), (shade, 90, 120))


# ------------------------------------------------------------------------------------------------------- columns
@pytest.mark.parametrize("row, questions, unusable", [
    ({"question": "how many?", "answer": " two  dogs"}, [Question("how many?", ("two dogs",))], 0),
    ({"question": "how many?", "answer": ["2", "two", None, "2"]}, [Question("how many?", ("2", "two", "2"))], 0),
    ({"question": "how many?", "answer": [{"answer": "2", "answer_id": 1}, {"answer": "3", "answer_id": 2}]},
     [Question("how many?", ("2", "3"))], 0),
    ({"question": "how many?", "answer": {"answer": ["2", "3"], "answer_id": [1, 2]}},
     [Question("how many?", ("2", "3"))], 0),
    ({"question": ["how many?", "what?", ""], "answer": [["2", "3"], ["a dog"], ["no"]]},
     [Question("how many?", ("2", "3")), Question("what?", ("a dog",))], 1),
    ({"question": ["how many?", "what?"], "answer": ["2", "a dog"]},
     [Question("how many?", ("2",)), Question("what?", ("a dog",))], 0),
    ({"question": ["how many?", "what?"], "answer": ["2"]}, [], 2),  # nobody knows which is missing
    ({"question": None, "answer": "yes"}, [], 1),
    ({"question": "how many?", "answer": [" ", None, 3]}, [], 1),
])  # fmt: skip
def test_questions_are_read_in_every_form(row, questions, unusable):
    assert questions_of_row(row, AnswerColumns("question", "answer")) == (questions, unusable)


def test_columns_are_found_by_name_or_named():
    classes = datasets.ClassLabel(names=["cat", "hot_dog"])
    split = datasets.Dataset.from_dict(
        {"Question": ["?"], "answer": ["one"], "answers": [["two"]], "label": [1], "kind": ["x"]},
        features=datasets.Features({
            "Question": datasets.Value("string"), "answer": datasets.Value("string"),
            "answers": datasets.List(datasets.Value("string")), "label": classes, "kind": datasets.Value("string"),
        }),
    )  # fmt: skip
    assert find_answer_columns(split, "s", AnswerColumns()) == AnswerColumns("Question", "answers", "label")
    named = AnswerColumns(answer="answer", label="kind")
    assert find_answer_columns(split, "s", named) == AnswerColumns("Question", "answer", "kind")
    numbers = datasets.Dataset.from_dict({"label": [1.5], "question": ["?"], "text": ["x"]})
    assert find_answer_columns(numbers, "s", AnswerColumns()) == AnswerColumns()  # no names, no answers
    with pytest.raises(InputError, match="column 'label' holds no class names"):
        find_answer_columns(numbers, "s", AnswerColumns(label="label"))
    with pytest.raises(InputError, match="looks like answers: name them with --answer-column"):
        find_answer_columns(numbers, "s", AnswerColumns(question="question"))


def test_every_class_has_its_turn():
    assert each_name_in_turn(["a", "a", None, "a", "b", "b", "c"]) == [0, 4, 6, 1, 5, 3, 2]


# -------------------------------------------------------------------------------------------------------- scores
class Scripted:
    """An answerer that says one thing to each question, "?" if it may not look."""

    pooled = None

    def __init__(self, said: dict[str, str]):
        self.said, self.asked = said, []

    def predict(self, texts, title, blind=False):
        self.asked += texts
        return ["?" if blind else self.said[text[-1].prompt] for text in texts]


def asked_about(
    questions: list[list[Question]], support: list[list[Question]]
) -> tuple[EvaluationSet, list[int], list[int]]:
    items, shown = ([Item(picture, "", ["a"], "1", questions=q) for q in own] for own in (questions, support))
    return (
        EvaluationSet("x", "test", items, [], shown, left_out=0),
        list(range(len(items))),
        list(range(100, 100 + len(shown))),
    )


def test_answers_are_scored_as_by_hand(tmp_path):
    many = Question("how many?", ("two",) * 3 + ("3",) * 7)
    colour = Question("what colour?", ("red",) * 10)
    demos = [[Question("is it?", ("no", "yes", "yes"))], [], [Question("was it?", ("no",))]]
    test_set, rows, support = asked_about([[many, colour], []], demos)
    task = questions_of_set(test_set, rows, support, 10, seed=0)
    model = Scripted({"Question: how many? Answer:": "2", "Question: what colour? Answer:": "Red."})
    table = curve(task, FewShot([0, 1], trials=1), model, Parts(tmp_path, {}), ("text_only_demos", "blind"))
    # "2" is what 3 of 10 said: each of them left out leaves 2 of 3 needed, each other one leaves 3 of 3. "Red." is
    # wrong by the rule of VQAv2, which normalises nothing where all agree; with exact_match it is right.
    assert table["0"]["vqa_accuracy"] == pytest.approx((0.3 * 2 / 3 + 0.7 + 0) / 2)
    assert table["0"]["exact_match"] == table["1"]["text_only_demos"] == 1
    assert table["0"]["blind"] == table["0"]["vqa_accuracy_blind"] == 0 and "blind" not in table["1"]
    assert table["1"].keys() >= {"vqa_accuracy_text_only_demos", "vqa_accuracy_spread", "vqa_accuracy_interval"}
    assert table["1"]["n"] == 2
    # the examples: support pictures that have a question, each with what most people answered
    shown = {chunk for text in model.asked for chunk in text[:-1] if chunk.picture is not None}
    assert shown and shown <= {
        Chunk(100, "Question: is it? Answer:", "yes"),
        Chunk(102, "Question: was it? Answer:", "no"),
    }


def test_one_answer_to_a_question_is_matched_only(tmp_path):
    test_set, rows, support = asked_about([[Question("how many?", ("Two!",))], [Question("what?", ("a",))]], [])
    model = Scripted({"Question: how many? Answer:": "2", "Question: what? Answer:": ""})
    task = questions_of_set(test_set, rows, support, 10, seed=0)
    row = curve(task, FewShot([0]), model, Parts(tmp_path, {}))["0"]
    assert row["exact_match"] == 0.5 and "vqa_accuracy" not in row  # an empty answer is not the article "a"


def test_questions_go_round_the_pictures():
    own = [[Question(f"{i} {k}?", ("yes",)) for k in range(2)] for i in range(3)]
    test_set, rows, support = asked_about(own, [])
    asked = questions_of_set(test_set, rows, support, 4, seed=0).queries
    assert [query.row for query in asked] == [0, 1, 2, 0] and asked[3].prompt == "Question: 0 1? Answer:"


def test_a_class_is_chosen_among_all_names(tmp_path):
    items = [Item(picture, "", ["x"], "1", label=name) for name in ("hot dog", "cat", None, "cat")]
    test_set = EvaluationSet("x", "test", items, [], items[:3], names=["cat", "cow", "hot dog"])
    task = classes_of_set(test_set, [0, 1, 2, 3], [10, 11, 12], 10, "Output:")

    class AlwaysCat:
        pooled = None

        def choose(self, texts, answers, title, blind=False):
            assert answers == ["cat", "cow", "hot dog"]
            return torch.tensor([[0.0, 1.0, 0.0] if blind else [1.0, 0.0, 0.0]] * len(texts))

    row = curve(task, FewShot([0]), AlwaysCat(), Parts(tmp_path, {}), ("text_only_demos", "blind"))["0"]
    assert row["exact_match"] == pytest.approx(2 / 3) and row["blind"] == 0 and task.chance == pytest.approx(1 / 3)
    (examples, *_) = choose_examples(task, 2, FewShot([2]), 0, AlwaysCat())
    assert set(examples) == {Chunk(10, "Output:", "hot dog"), Chunk(11, "Output:", "cat")}


def test_without_the_picture_all_pictures_are_alike(fresh):
    rows = fresh.add([picture(0), Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))])
    texts = [[Chunk(row)] for row in rows]
    seen, blind = (fresh.choose(texts, ["a dog", "two cats"], "x", blind=flag) for flag in (False, True))
    assert torch.allclose(blind[0], blind[1], atol=1e-5) and not torch.allclose(seen[0], seen[1], atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- sets
def asked_folder(folder: Path, **renamed: str) -> Path:
    """Captioned pictures with a question, three answers and a class; of the test pictures one has no answer."""
    for split, count in {"train": 8, "test": 5}.items():
        (folder / split).mkdir(parents=True)
        rows = []
        for i in range(count):
            picture(25 * i).save(folder / split / f"{split}{i}.png")
            row = {
                "file_name": f"{split}{i}.png", "caption": f"a {split} picture of shade {i}",
                "question": f"which shade is number {i}?", "label": ("dark_blue", "grey", "sea_green")[i % 3],
                "answers": [] if i == 4 else [str(i), "blue", "blue"],
            }  # fmt: skip
            rows.append(json.dumps({renamed.get(name, name): value for name, value in row.items()}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_class_folders_need_no_captions(tmp_path):
    for split, count in (("train", 4), ("test", 3)):
        for name in ("cat", "hot_dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture(20 * i).save(tmp_path / split / name / f"{i}.png")
    test_set = captioned_test_set(TrainingOptions(data=str(tmp_path)), None, 4, seed=0)
    assert test_set.names == ["cat", "hot dog"] and test_set.left_out is None
    assert [item.label for item in test_set.items] == ["cat", "hot dog"] * 2  # not the first four, which are cats
    assert all(item.captioned_by_class for item in (*test_set.items, *test_set.support))
    with pytest.raises(InputError, match="none of image, label looks like captions"):  # training asks for captions
        load_captions(str(tmp_path))


def test_questions_and_classes_of_a_set_are_examined_and_a_stop_costs_little(run_folder, tmp_path, capsys, monkeypatch):
    words = (run_folder, "--data", asked_folder(tmp_path / "set"), "--shots", 0, 2, "--trials", 1)
    predict, asked = Predictor.predict, []
    monkeypatch.setattr(
        Predictor, "predict", lambda self, texts, title, **c: asked.append(title) or predict(self, texts, title, **c)
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Predictor, "choose", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        run_command(*words)
    assert "questions, 0 shots, trial 1, blind" in asked
    before = list(asked)
    run_command(*words)
    assert asked == before  # only the classes were left to do

    result = json.loads((run_folder / "evaluation.json").read_text())
    questions, classes = result["questions"], result["classification"]
    assert questions["n"] == 4 and questions["left_out"] == 1 and classes["names"] == 3
    assert classes["chance"] == pytest.approx(1 / 3) and classes["shots"]["0"]["n"] == 5
    assert questions["shots"].keys() == classes["shots"].keys() == {"0", "2"}
    for table, scores in ((questions["shots"], ("exact_match", "vqa_accuracy")), (classes["shots"], ("exact_match",))):
        for k, row in table.items():
            names = [*scores, "text_only_demos", *(["blind"] if k == "0" else [])]
            assert all(0 <= row[name] <= 1 and len(row[f"{name}_interval"]) == 2 for name in names)
    printed = capsys.readouterr().out
    assert "Questions: n = 4, 1 left out" in printed and "Which one: 3 names, guessing 0.333" in printed
    page = (run_folder / "report.html").read_text()
    assert "<th>questions, VQA accuracy</th>" in page and "<th>which one?</th>" in page
    assert "Answers against the number of examples." in page


def test_no_picture_is_both_asked_about_and_an_example(tmp_path):
    """A set of one split serves as its own training split: two of five are asked about, one is lent to validation."""
    (asked_folder(tmp_path / "set") / "train").rename(tmp_path / "elsewhere")
    test_set = captioned_test_set(TrainingOptions(data=str(tmp_path / "set")), "test", 100, 0)
    asked, shown = ({item.truths[0] for item in items} for items in (test_set.items, test_set.support))
    assert len(asked) == 2 and len(shown) == 2 and not asked & shown


def test_columns_of_other_names(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Predictor, "predict", lambda *_, **__: pytest.fail("something was run"))
    data = asked_folder(tmp_path / "set", question="ask", answers="told", label="kind")
    options = TrainingOptions(data=str(data))
    test_set = captioned_test_set(options, None, 5, 0)
    assert test_set.left_out is None and not test_set.names and not any(item.questions for item in test_set.items)
    test_set = captioned_test_set(options, None, 5, 0, AnswerColumns("ask", "told", "kind"))
    assert test_set.left_out == 1 and test_set.names == ["dark blue", "grey", "sea green"]
    assert test_set.fingerprint() != captioned_test_set(options, None, 5, 0, AnswerColumns("ask", "told")).fingerprint()
    for flag in ("--question-column", "--answer-column", "--label-column"):
        with pytest.raises(InputError, match="has no column 'nose': it has ") as caught:
            run_command(run_folder, "--data", data, flag, "nose")
        assert "\n" not in str(caught.value) and all(name in str(caught.value) for name in ("ask", "told", "kind"))
    with pytest.raises(InputError, match="belong to --data: name the set"):
        run_command(run_folder, "--label-column", "kind")


def test_questions_without_captions_are_refused_in_a_sentence(tmp_path):
    data = asked_folder(tmp_path / "set", caption="remark", label="kind")
    with pytest.raises(InputError, match=re.escape("has questions but no captions, and captions are scored first")):
        captioned_test_set(TrainingOptions(data=str(data)), None, 5, 0)
