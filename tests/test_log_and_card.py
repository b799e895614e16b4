"""What people's tools find in a run folder: events for TensorBoard, and a model card that a hub understands."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import committed_evaluation
from huggingface_hub import ModelCard
from test_commands import one_sentence, run

from flamingo import FlamingoModel
from flamingo.files import asset
from flamingo.training import card
from flamingo.training.checkpoint import read_config

SHORT = ["--steps", "3", "--batch-size", "4", "--eval-batches", "1", "--eval-every", "2", "--device", "cpu",
         "--dtype", "float32"]  # fmt: skip
COMMITTED = asset("classroom/flamingo")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    pytest.importorskip("tensorboard", reason="needs requirements-demo.txt")
    folder = tmp_path_factory.mktemp("run") / "mine"
    result = run("train.py", *SHORT, "--out", folder, "--log", "tensorboard")
    assert result.returncode == 0, result.stderr
    return folder


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------- tensorboard
def test_tensorboard_reads_what_metrics_jsonl_holds(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    by_step = {entry["step"]: entry for entry in entries(finished) if "loss" in entry}
    found = {event.step: event.value for event in events.Scalars("training/loss")}
    assert found == pytest.approx({step: entry["loss"] for step, entry in by_step.items()}) and len(found) == 3
    validations = [entry for entry in entries(finished) if "val_loss" in entry]
    for name, of in (("validation/val_loss_blind", "val_loss_blind"), ("validation/exact_match", "exact_match")):
        assert [event.value for event in events.Scalars(name)] == pytest.approx([entry[of] for entry in validations])
    opened = [event.value for event in events.Scalars("gates/attn_1")]
    assert opened == pytest.approx([entry["attn"][1] for entry in validations])
    assert [event.step for event in events.Images("sample 3")] == [2, 3]
    assert "sample 0/text_summary" in events.Tags()["tensors"]


def test_the_captions_of_the_same_pictures_are_kept_at_every_validation(finished):
    samples = [entry["samples"] for entry in entries(finished) if "val_loss" in entry]
    assert len(samples) == 2 and all(len(some) == 4 for some in samples)
    assert [true for _, true in samples[0]] == [true for _, true in samples[1]]


def test_an_unknown_log_is_a_sentence_and_metrics_jsonl_the_default(tmp_path):
    one_sentence(run("train.py", *SHORT, "--out", tmp_path / "run", "--log", "wandb"), "--log must be one of")
    assert not (tmp_path / "run").exists()
    assert "also write losses" in run("train.py", "--help").stdout


# ----------------------------------------------------------------------------------------------------- the card
def test_a_finished_run_has_a_card_and_its_evaluation_adds_the_scores(finished):
    before = ModelCard.load(finished / "README.md")
    assert before.data.pipeline_tag == "image-text-to-text" and "flamingo" in before.data.tags
    assert before.data.eval_results is None and "3 steps" in before.text and "frozen ones" in before.text
    result = run("evaluate.py", finished, "--n", "20", "--device", "cpu", "--shots")
    assert result.returncode == 0, result.stderr
    after = ModelCard.load(finished / "README.md")
    scores = {one.metric_type: one.metric_value for one in after.data.eval_results}
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert scores["exact_match"] == evaluation["exact_match"] and evaluation["verdict"] in after.text
    assert "no picture" in after.text and "another's picture" in after.text


def committed_score() -> tuple[str, str]:
    """Exact match of the committed run, and with its interval."""
    headline = committed_evaluation()["metrics"]["exact_match"]
    return f"{headline['value']:.3f}", f"{headline['value']:.3f} ({headline['low']:.3f} to {headline['high']:.3f})"


def committed_card() -> str:
    summary, evaluation = json.loads((COMMITTED / "summary.json").read_text()), committed_evaluation()
    return card.card_text("classroom", read_config(COMMITTED), summary, evaluation)


def test_the_card_says_what_is_known_and_no_more():
    text = committed_card()
    assert f"| exact_match | {committed_score()[1]} | 0.000 | 0.000 |" in text and "OpenMoji" in text
    assert ModelCard(text).data.base_model is None  # both lie in our own assets
    config, summary = read_config(COMMITTED), json.loads((COMMITTED / "summary.json").read_text())
    config.language.name, config.vision.name = "facebook/opt-125m", "ViT-L-14-quickgelu:openai"
    summary["options"] |= {"data": "jxie/flickr8k"}
    data = ModelCard(card.card_text("mine", config, summary)).data
    assert data.base_model == ["facebook/opt-125m"] and data.datasets == ["jxie/flickr8k"]
    summary["options"] |= {"data": "/home/me/secret/pictures", "data_place": "/home/me/secret/pictures"}
    text = card.card_text("mine", config, summary)
    assert "`pictures`" in text and "secret" not in text and ModelCard(text).data.datasets is None


def test_the_card_says_what_was_trained_and_is_in_the_folder():
    config = read_config(COMMITTED)
    assert "the cross-attention and two added tokens. Only that is in this" in card.card_text("mine", config)
    config.fusion_type, config.tokenizer_type, config.language.lora_rank = "language-stream", "linear", 8
    text = card.card_text("mine", config)
    assert "the linear vision tokenizer, a LoRA of rank 8 beside the language model and two added tokens" in text
    config.language.lora_rank, config.language.freeze = None, False
    text = card.card_text("mine", config)
    assert "the language model, whose weights are in this repository too" in text and "Both are frozen" not in text


def test_the_card_names_what_was_tested_and_no_place_of_this_machine():
    config, summary = read_config(COMMITTED), json.loads((COMMITTED / "summary.json").read_text())
    evaluation = committed_evaluation() | {"data": "/home/me/secret/others"}
    summary["options"] |= {"data": "/home/me/secret/a.tar:0.5 + /home/me/secret/b:0.5", "data_place": None}
    text = card.card_text("mine", config, summary, evaluation)
    assert "a.tar:0.5 + b:0.5" in text and ModelCard(text).data.datasets is None
    assert {one.dataset_type for one in ModelCard(text).data.eval_results} == {"others"}
    assert "secret" not in text


def test_a_card_that_somebody_wrote_is_left_alone(tmp_path):
    shutil.copy(COMMITTED / "config.json", tmp_path)
    (tmp_path / "README.md").write_text("my own words")
    card.write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_push_to_hub_uploads_the_card_with_its_scores_as_long_as_they_are_the_models(tmp_path, monkeypatch):
    run_folder = shutil.copytree(COMMITTED, tmp_path / "classroom")
    card.write_card(run_folder)
    model = FlamingoModel.from_pretrained(run_folder)
    pushed = {}

    class Hub:
        def __init__(self, token=None):
            pushed["token"] = token

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **message):
            pushed.update(message, repo_id=repo_id, files={path.name for path in Path(folder_path).iterdir()},
                          card=(Path(folder_path) / "README.md").read_text())  # fmt: skip
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert model.push_to_hub("classroom", token="t", commit_message="mine") == "https://hub/commit"
    assert pushed["repo_id"] == "me/classroom" and pushed["commit_message"] == "mine" and pushed["token"] == "t"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= pushed["files"]
    score, _ = committed_score()
    assert score in pushed["card"] and "It looks" in pushed["card"]
    changed = {"a gate": model.flamingo.cross_attention_blocks()[0].attn_gate,
               "the language model": next(model.flamingo.lang_encoder.parameters())}  # fmt: skip
    for what, weight in changed.items():
        before = weight.detach().clone()
        assert score in model.card("classroom")
        weight.data.add_(0.1)
        assert score not in model.card("classroom"), what
        weight.data.copy_(before)
    changed["a gate"].data.add_(0.1)
    model.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="other")
    assert score not in pushed["card"] and "# other" in pushed["card"]
    assert "# other" in (tmp_path / "other" / "README.md").read_text()
