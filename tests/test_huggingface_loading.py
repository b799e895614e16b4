"""Loading, saving and moving a FlamingoModel: no option is swallowed, no weight is lost, no folder gets poorer."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from flamingo import FlamingoConfig, FlamingoModel, FlamingoProcessor, InputError
from flamingo.classroom import scenes
from flamingo.data.preprocess import Preprocess
from flamingo.fast.inference import prepare_to_generate
from flamingo.files import asset

FOLDER = asset("classroom/flamingo")
PROCESSOR = FlamingoProcessor.from_pretrained(FOLDER)
INPUTS = PROCESSOR(images=scenes.make_scene(0, "test", 0).draw(), text="<image> As a list:")
OWN = load_file(FOLDER / "model.safetensors")


def load(**options) -> FlamingoModel:
    return FlamingoModel.from_pretrained(FOLDER, **options)


@pytest.fixture
def model() -> FlamingoModel:
    return load()


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return load()(**INPUTS).logits.detach()


# -------------------------------------------------------------------------------------------------- what is saved
def test_freezing_loses_nothing(model, tmp_path):
    model.requires_grad_(False)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == OWN.keys() and all(torch.equal(saved[name], OWN[name]) for name in OWN)


def test_saving_over_a_good_folder_drops_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.flamingo.vision_tokenizer.requires_grad_(False)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == OWN.keys()


def test_a_backbone_that_has_changed_is_saved_whole_even_if_it_is_frozen(model, tmp_path):
    weight = model.flamingo.lang_encoder.get_input_embeddings().weight
    weight.data[7:].add_(0.5)
    model.save_pretrained(tmp_path)
    again = FlamingoModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    again.save_pretrained(tmp_path / "again")  # and is not forgotten later
    assert torch.equal(FlamingoModel.from_pretrained(tmp_path / "again")(**INPUTS).logits, model(**INPUTS).logits)


def test_a_model_in_another_dtype_still_has_its_named_backbones(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == OWN.keys() and {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert FlamingoModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert FlamingoModel.from_pretrained(tmp_path).dtype == torch.float32


def test_a_model_prepared_to_generate_is_not_saved_in_part(model, tmp_path):
    prepare_to_generate(model.flamingo, "float32")
    if not any(name.endswith("to_q.weight") for name, _ in model.named_parameters()):  # matrices were packed
        with pytest.raises(InputError, match="prepared to generate"):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_options_of_save_pretrained_are_honoured_or_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not (tmp_path / "worker").exists()
    model.save_pretrained(tmp_path, max_shard_size="2MB", safe_serialization=True, save_function=None)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and "model.safetensors" not in files
    assert torch.equal(FlamingoModel.from_pretrained(tmp_path)(**INPUTS).logits, model(**INPUTS).logits)
    model.save_pretrained(tmp_path)  # one file again: no shard of the other save stays behind
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    doubled = {name: tensor * 2 if name.endswith("latents") else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["perceiver.latents"], OWN["perceiver.latents"] * 2)
    with pytest.raises(InputError, match="lacks 48 tensors that the folder needs"):
        model.save_pretrained(tmp_path, state_dict={"perceiver.latents": OWN["perceiver.latents"]})
    with pytest.raises(InputError, match="no option variant='fp16'"):
        model.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(InputError, match="no option nonsense=3"):
        model.save_pretrained(tmp_path, nonsense=3)


def test_the_configs_are_saved_with_what_a_user_has_set(model, tmp_path, capsys):
    model.config.use_cache = False  # as the Trainer does
    model.config.output_hidden_states = True
    model.config.favourite = "blue"
    model.generation_config.max_new_tokens = 2
    model.save_pretrained(tmp_path)
    assert "config.favourite: not saved" in capsys.readouterr().err
    again = FlamingoModel.from_pretrained(tmp_path)
    assert again.config.use_cache is False and again.config.output_hidden_states is True
    assert again(**INPUTS).hidden_states is not None
    assert again.generate(**INPUTS).shape[1] == INPUTS["input_ids"].shape[1] + 2
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    FlamingoModel.from_pretrained(tmp_path)


def test_load_state_dict_takes_the_names_of_a_checkpoint_and_its_own(model):
    changed = {name: tensor + 1 for name, tensor in OWN.items()}
    for names in (changed, {f"flamingo.{name}": tensor for name, tensor in changed.items()}):
        model.load_state_dict({name: tensor - 1 for name, tensor in names.items()})
        result = model.load_state_dict(names)
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(model.flamingo.vision_tokenizer.latents, changed["perceiver.latents"])
    changed.pop("perceiver.latents")
    assert model.load_state_dict(changed, strict=False).missing_keys == ["flamingo.perceiver.latents"]
    with pytest.raises(RuntimeError, match=r"perceiver\.latents"):
        model.load_state_dict(changed)


# ------------------------------------------------------------------------------------------------- what is loaded
def test_options_of_from_pretrained_are_honoured():
    for option in ({"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {"dtype": torch.bfloat16}):
        assert {p.dtype for p in load(**option).parameters()} == {torch.bfloat16}
    eager = load(attn_implementation="eager")
    assert eager.flamingo.lang_encoder.config._attn_implementation == eager.config._attn_implementation == "eager"
    model, info = load(output_loading_info=True)
    assert isinstance(model, FlamingoModel) and not info["missing_keys"] and not info["unexpected_keys"]
    config = FlamingoConfig.from_pretrained(FOLDER)
    config.only_attend_immediate_media = False
    assert not load(config=config).flamingo.lang_encoder.only_immediate_media
    assert not load(only_attend_immediate_media=False).flamingo.lang_encoder.only_immediate_media
    assert load(generation_config=GenerationConfig(max_new_tokens=3)).generation_config.max_new_tokens == 3
    assert load(device_map={"": "cpu"}, trust_remote_code=False, low_cpu_mem_usage=True).device.type == "cpu"
    assert FlamingoModel.from_pretrained(FOLDER.parent, subfolder=FOLDER.name).name_or_path == str(FOLDER.parent)
    assert FlamingoProcessor.from_pretrained(FOLDER.parent, subfolder=FOLDER.name).media_token_id


@pytest.mark.parametrize(
    "option, message",
    [({"nonsense": 3}, "no option nonsense=3"), ({"dtype": "bfloat61"}, "dtype='bfloat61' is no dtype of weights"),
     ({"dtype": torch.int8}, "is no dtype of weights"), ({"device_map": "nowhere"}, "'nowhere' is no device"),
     ({"max_memory": {0: "1GB"}}, "no option max_memory"), ({"variant": "fp16"}, "no option variant"),
     ({"use_safetensors": False}, "no option use_safetensors=False")],
)  # fmt: skip
def test_other_options_are_refused_by_name(option, message):
    with pytest.raises(InputError, match=message):
        load(**option)


def test_from_config_has_the_dtype_and_attention_that_are_asked_for():
    config = AutoConfig.from_pretrained(FOLDER)
    made = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    assert made.dtype == torch.bfloat16
    assert made.flamingo.lang_encoder.config._attn_implementation == "eager"


def test_a_config_and_a_state_dict_make_a_model(model, expected):
    made = FlamingoModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(made(**INPUTS).logits, expected)
    with pytest.raises(InputError, match="no option state_dict="):
        load(state_dict={})


def test_the_vocabulary_is_not_resized(model):
    with pytest.raises(InputError, match="that of the frozen language model"):
        model.resize_token_embeddings(2000)


# --------------------------------------------------------------------------------------------- pickles and copies
def test_a_model_can_be_pickled_copied_and_saved_by_torch(model, expected, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), again):
        assert torch.equal(other(**INPUTS).logits, expected)
        assert type(other.flamingo.lang_encoder).__name__ == "FlamingoOPTForCausalLM"
        other.flamingo.vision_tokenizer.latents.data.zero_()
    assert torch.equal(model(**INPUTS).logits, expected)


def test_spawned_workers_can_use_the_processor_of_a_hugging_face_clip():
    settings = {"library": "transformers", "size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    processor = FlamingoProcessor(PROCESSOR.tokenizer, Preprocess(settings))
    pictures = [scenes.make_scene(0, "test", i).draw() for i in range(2)]
    loader = DataLoader(pictures, batch_size=2, collate_fn=processor, num_workers=1, multiprocessing_context="spawn")
    (batch,) = loader
    assert torch.equal(batch["pixel_values"], processor(pictures)["pixel_values"])
