"""Several adapters beside one model: which of them act, what is saved of them, and what peft cannot do."""

import json

import pytest
import torch

from flamingo import FlamingoModel, FlamingoProcessor, InputError
from flamingo.classroom import scenes
from flamingo.files import asset
from flamingo.training.checkpoint import read_config

peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")

FOLDER = asset("classroom/flamingo")
PICTURE = scenes.make_scene(0, "test", 0).draw()
INPUTS = FlamingoProcessor.from_pretrained(FOLDER)(images=PICTURE, text="<image> As a list:")


def lora(**options) -> peft.LoraConfig:
    """One that changes what the model says from the beginning."""
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options)


def with_adapters(*names: str) -> FlamingoModel:
    torch.manual_seed(0)
    model = FlamingoModel.from_pretrained(FOLDER)
    for name in names:
        model.add_adapter(lora(), name)
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**INPUTS).logits


def test_adapters_act_one_at_a_time_together_or_not_at_all():
    plain = logits(FlamingoModel.from_pretrained(FOLDER))
    model = with_adapters("one", "two")
    assert model.active_adapters() == ["two"]  # the latest
    found = {"two": logits(model)}
    for names in ("one", ["one", "two"]):
        model.set_adapter(names)
        assert model.active_adapters() == ([names] if isinstance(names, str) else names)
        found[str(names)] = logits(model)
    values = [plain, *found.values()]
    assert not any(torch.allclose(a, b) for i, a in enumerate(values) for b in values[:i])
    model.disable_adapters()
    assert model.active_adapters() == [] and torch.equal(logits(model), plain)
    model.enable_adapters()
    model.set_adapter("two")
    assert torch.equal(logits(model), found["two"])
    with pytest.raises(ValueError, match="no adapter 'three', but one, two"):
        model.set_adapter("three")


def test_the_active_adapter_trains_beside_the_added_parts_and_the_others_rest():
    model = with_adapters("one", "two")
    model.set_adapter("one")
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(".one." in name for name in trains) and any(name.endswith("perceiver.latents") for name in trains)
    assert not any(".two." in name for name in trains)


@pytest.mark.parametrize("active", ["one", "two", ["one", "two"], None])
def test_all_adapters_are_saved_and_those_act_that_acted(active, tmp_path):
    model = with_adapters("one", "two")
    model.disable_adapters() if active is None else model.set_adapter(active)
    model.save_pretrained(tmp_path)
    again = FlamingoModel.from_pretrained(tmp_path)
    assert list(again.peft_config) == ["one", "two"] and again.active_adapters() == model.active_adapters()
    assert torch.equal(logits(again), logits(model))
    for one in (model, again):
        one.enable_adapters()
        one.set_adapter("one")
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_can_be_taken_away_again(tmp_path):
    model = with_adapters("one", "two")
    model.delete_adapter("two")
    assert list(model.peft_config) == model.active_adapters() == ["one"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(FlamingoModel.from_pretrained(tmp_path)), logits(model))
    model.delete_adapter(["one"])
    assert torch.equal(logits(model), logits(FlamingoModel.from_pretrained(FOLDER)))
    model.save_pretrained(tmp_path)
    assert FlamingoModel.from_pretrained(tmp_path).active_adapters() == []
    with pytest.raises(ValueError, match="has no adapter: add_adapter gives it one"):
        model.set_adapter("one")


def test_an_adapter_that_peft_has_saved_is_loaded(tmp_path):
    made = peft.get_peft_model(FlamingoModel.from_pretrained(FOLDER), lora())
    made.save_pretrained(tmp_path)
    model = with_adapters("one")
    model.load_adapter(tmp_path, "two")
    torch.testing.assert_close(logits(model), logits(made))
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".two." in name)
    model.load_adapter(tmp_path, "three", is_trainable=True)
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if ".three." in name)
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        model.load_adapter(tmp_path / "nowhere", "four")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match="holds an adapter of another model"):
        model.load_adapter(tmp_path, "four")
    assert list(model.peft_config) == ["one", "two", "three"]


KINDS = {
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj", "fc1"], feedforward_modules=["fc1"]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "DoRA": lambda: lora(use_dora=True),
    "all linear": lambda: lora(target_modules="all-linear"),
    "norms as well": lambda: lora(modules_to_save=["final_layer_norm"]),
    "of the cross-attention": lambda: lora(target_modules=["to_q"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_adapters_train_and_are_saved(kind, tmp_path):
    model = FlamingoModel.from_pretrained(FOLDER)
    model.add_adapter(KINDS[kind]())
    model.train()(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(FlamingoModel.from_pretrained(tmp_path)), logits(model))


IMPOSSIBLE = {
    "peft cannot put this adapter": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "not found in the base model": lambda: lora(target_modules=["nowhere"]),
    "no adapter can stand beside lm_head": lambda: lora(target_modules=["lm_head"]),
    "trainable_token_indices": lambda: lora(trainable_token_indices=[3]),
    "needs a config of peft": lambda: {"r": 2},
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_what_cannot_be_put_in_is_one_sentence_and_leaves_the_model_alone(message):
    model = FlamingoModel.from_pretrained(FOLDER)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=message):
        model.add_adapter(IMPOSSIBLE[message]())
    assert [name for name, _ in model.named_parameters()] == names
    with pytest.raises(InputError, match=r"cannot be called 'a\.b'"):
        model.add_adapter(lora(), "a.b")


def test_a_config_that_names_an_active_adapter_it_does_not_have_is_damaged(tmp_path):
    with_adapters("one").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for active in (["two"], "one", [1]):
        (tmp_path / "config.json").write_text(json.dumps(settings | {"active_adapters": active}))
        with pytest.raises(InputError, match="active_adapters"):
            read_config(tmp_path)
