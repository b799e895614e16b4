"""The Trainer of transformers, and LoRA, on a FlamingoModel: what is trained is saved, and what is saved comes back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from flamingo import FlamingoModel, FlamingoProcessor, InputError
from flamingo.classroom import scenes
from flamingo.data.batches import caption_labels
from flamingo.files import asset

pytest.importorskip("accelerate", reason="the Trainer needs accelerate: pip install accelerate")

FOLDER = asset("classroom/flamingo")
SCENES = [scenes.make_scene(0, "train", i) for i in range(8)]
ROWS = [{"image": s.draw(), "caption": s.caption("list" if i % 2 else "story")} for i, s in enumerate(SCENES)]
PROCESSOR = FlamingoProcessor.from_pretrained(FOLDER)


def collate(rows) -> dict:
    texts = PROCESSOR.prepare_captions([row["caption"] for row in rows])
    batch = PROCESSOR(images=[row["image"] for row in rows], text=texts, padding_side="right")
    special = PROCESSOR.media_token_id, PROCESSOR.eoc_token_id
    return {**batch, "labels": caption_labels(batch["input_ids"], batch["attention_mask"], *special)}


def trainer(out: Path, model=None, **options) -> Trainer:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": "none",
                "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True, "seed": 0} | options  # fmt: skip
    model = model or FlamingoModel.from_pretrained(FOLDER)
    arguments = TrainingArguments(out, **settings)
    return Trainer(
        model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], data_collator=collate, processing_class=PROCESSOR
    )


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[Path, FlamingoModel]:
    """Four steps, saved after two and four."""
    out = tmp_path_factory.mktemp("whole")
    run = trainer(out, save_steps=2)
    run.train()
    return out, run.model


def test_a_run_saves_what_was_trained_and_keeps_the_backbones_bit_for_bit(whole_run):
    out, model = whole_run
    saved = load_file(out / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == FlamingoModel.from_pretrained(FOLDER).state_dict_trainable().keys()
    before = FlamingoModel.from_pretrained(FOLDER).state_dict()
    for name, tensor in model.state_dict().items():
        if name.removeprefix("flamingo.") not in saved and "additional_" not in name:
            assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(tensor, before[f"flamingo.{name}"]) for name, tensor in saved.items())


def test_what_the_trainer_saved_can_be_loaded(whole_run):
    out, model = whole_run
    again = FlamingoModel.from_pretrained(out / "checkpoint-4")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_resumed_run_ends_as_one_that_was_never_stopped(whole_run, tmp_path, caplog):
    out, model = whole_run
    resumed = trainer(tmp_path, save_steps=2)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text


def test_the_best_model_comes_back_at_the_end(tmp_path):
    """A learning rate that ruins the model after the first evaluation: the first checkpoint is the best."""
    run = trainer(
        tmp_path, max_steps=2, learning_rate=0.5, lr_scheduler_type="constant_with_warmup", warmup_steps=1,
        eval_strategy="steps", eval_steps=1, save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    for name, tensor in best.items():
        assert torch.equal(tensor, run.model.state_dict()[f"flamingo.{name}"]), name


@pytest.mark.skipif(
    transformers.__version__.startswith("5.4."), reason="the Trainer of transformers 5.4 divides the gradient once more"
)
def test_loss_and_gradient_do_not_depend_on_how_a_batch_is_accumulated(tmp_path):
    """8 texts at once, or 4 and 4, or 2 and 2 and 2 and 2, of very different lengths: the same loss and gradient."""
    found = []
    for size, pieces in ((8, 1), (4, 2), (2, 4)):
        run = trainer(
            tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=pieces,
            logging_steps=1, max_grad_norm=1e9, save_strategy="no",
        )  # fmt: skip
        run.train()
        log = run.state.log_history[0]
        found.append((log["loss"], log["grad_norm"]))
    for loss, norm in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-3) and norm == pytest.approx(found[0][1], rel=1e-2)


def first_loss(out: Path, **options) -> float:
    run = trainer(out, max_steps=1, logging_steps=1, save_strategy="no", **options)
    run.train()
    return run.state.log_history[0]["loss"]


@pytest.fixture(scope="module")
def plain_loss(tmp_path_factory) -> float:
    return first_loss(tmp_path_factory.mktemp("plain"))


@pytest.mark.skipif(
    transformers.__version__.startswith("5.4."), reason="the smoothed loss of 5.4 knows nothing of num_items_in_batch"
)
def test_a_loss_that_the_trainer_computes_is_that_of_the_next_token(tmp_path, plain_loss):
    """Hardly smoothed it is the plain loss; of unshifted labels it would be fifty times that."""
    assert first_loss(tmp_path, label_smoothing_factor=1e-9) == pytest.approx(plain_loss, rel=1e-3)


def test_noise_on_the_token_embeddings_acts_though_they_are_frozen(tmp_path, plain_loss):
    assert abs(first_loss(tmp_path, neftune_noise_alpha=50) - plain_loss) > 0.01


def test_evaluation_keeps_logits_and_labels_and_nothing_else(tmp_path):
    """With a loss of the Trainer's own too, for which the model is given no labels and might hand out its cache."""
    for smoothing in (0.0, 0.1):
        seen = []
        run = trainer(tmp_path, label_smoothing_factor=smoothing, per_device_eval_batch_size=2)
        run.compute_metrics = lambda found, seen=seen: seen.append(found) or {"n": 1}
        assert "eval_loss" in run.evaluate()
        assert len(seen) == 1 and seen[0].predictions.shape == (*seen[0].label_ids.shape, 1078)


def test_a_worker_reads_as_the_process_itself(tmp_path, plain_loss):
    assert first_loss(tmp_path, dataloader_num_workers=1) == plain_loss


def test_seq2seq_trainer_predicts(tmp_path):
    arguments = Seq2SeqTrainingArguments(
        tmp_path, per_device_eval_batch_size=2, predict_with_generate=True, report_to="none", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    model = FlamingoModel.from_pretrained(FOLDER)
    predicting = Seq2SeqTrainer(model, arguments, data_collator=collate)
    found = predicting.predict(ROWS[:4], max_new_tokens=3)
    assert len(found.predictions) == 4 and found.label_ids.shape[0] == 4


# ------------------------------------------------------------------------------------------------------------ LoRA
def with_lora(name: str = "default", **options) -> FlamingoModel:
    peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")
    model = FlamingoModel.from_pretrained(FOLDER)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options), name)
    return model


def test_lora_trains_beside_the_added_parts_and_is_in_the_checkpoint(tmp_path):
    model = with_lora(lora_dropout=0.5)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in names) and any(name.endswith("perceiver.latents") for name in names)
    before = tensors(model)
    run = trainer(tmp_path, model, max_steps=2, save_steps=1)
    run.train()
    moved = {name for name, tensor in tensors(run.model).items() if not torch.equal(tensor, before[name])}
    assert any("lora_A" in name for name in moved) and not any("base_layer" in name for name in moved)
    again = FlamingoModel.from_pretrained(tmp_path / "checkpoint-2")
    assert list(again.peft_config) == ["default"]
    for name, tensor in tensors(run.model).items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    resumed = trainer(tmp_path, with_lora(lora_dropout=0.5), max_steps=2, save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, tensor in tensors(run.model).items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_dropout_of_lora_acts_in_training_though_the_language_model_is_frozen():
    model = with_lora(lora_dropout=0.5).train()
    dropouts = [m for n, m in model.named_modules() if "lora_dropout" in n and isinstance(m, torch.nn.Dropout)]
    assert dropouts and all(dropout.training for dropout in dropouts)
    assert not model.flamingo.lang_encoder.training
    assert not any(dropout.training for dropout in dropouts if model.eval())


def test_merged_lora_is_saved_with_the_language_model_it_was_merged_into(tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")
    base = FlamingoModel.from_pretrained(FOLDER)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = FlamingoModel.from_pretrained(tmp_path)
    batch = collate(ROWS[:2])
    original = FlamingoModel.from_pretrained(FOLDER)(**batch).loss
    torch.testing.assert_close(again(**batch).loss, merged(**batch).loss)
    assert not torch.allclose(again(**batch).loss, original)


def test_an_adapter_of_peft_alone_is_saved_and_loaded_by_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(FlamingoModel.from_pretrained(FOLDER), config)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(FlamingoModel.from_pretrained(FOLDER), tmp_path)
    batch = collate(ROWS[:2])
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_a_lora_model_without_peft_is_one_sentence(tmp_path, monkeypatch):
    with_lora().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        FlamingoModel.from_pretrained(tmp_path)


def test_the_example_trains_on_a_folder_of_pictures_and_answers(tmp_path):
    pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")
    (tmp_path / "pictures").mkdir()
    lines = []
    for i, row in enumerate(ROWS):
        row["image"].save(tmp_path / "pictures" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": row["caption"]}))
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, root / "examples" / "hugging_face.py", tmp_path / "pictures", tmp_path / "out"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root), "HF_DATASETS_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("<image>")
    assert list(FlamingoModel.from_pretrained(tmp_path / "out").peft_config) == ["default"]


def test_a_palm_of_ours_is_trained_as_well_and_two_half_batches_are_one(tmp_path):
    from flamingo.model.palm import PaLMConfig, PaLMForCausalLM

    def trained(batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
        palm = PaLMForCausalLM(PaLMConfig(vocab_size=30, **shape))
        rows = [{"input_ids": row, "labels": row} for row in torch.arange(24).view(4, 6)]
        arguments = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate,
            learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        Trainer(palm, arguments, train_dataset=rows).train()
        return tensors(palm)

    one, other = trained(4, 1), trained(2, 2)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-3, msg=name)
