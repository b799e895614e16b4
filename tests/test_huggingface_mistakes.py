"""A name that is mistyped, an option that has no meaning here, a table that was exchanged: said, and never ignored."""

import pytest
import torch
from torch import nn
from transformers import AutoProcessor, pipeline

from flamingo import FlamingoModel, FlamingoProcessor, InputError
from flamingo.classroom import scenes
from flamingo.files import asset

FOLDER = asset("classroom/flamingo")
PICTURES = [scenes.make_scene(0, "test", i).draw() for i in range(3)]
PROMPT = "<image> As a list:"


@pytest.fixture(scope="module")
def model() -> FlamingoModel:
    return FlamingoModel.from_pretrained(FOLDER)


@pytest.fixture
def processor() -> FlamingoProcessor:
    return FlamingoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def inputs():
    return FlamingoProcessor.from_pretrained(FOLDER)(images=PICTURES[:1], text=PROMPT)


# --------------------------------------------------------------------------------------------------------- forward
@pytest.mark.parametrize(
    "mistyped, right",
    [("pixel_value", "pixel_values"), ("image", "pixel_values"), ("images", "pixel_values"), ("label", "labels"),
     ("visual_feature", "visual_features"), ("media_location", "media_locations"), ("use_caches", "use_cache")],
)  # fmt: skip
def test_a_mistyped_argument_is_refused_with_the_right_name(model, inputs, mistyped, right):
    with pytest.raises(TypeError, match=f"no argument {mistyped!r}: did you mean {right!r}"):
        model(inputs["input_ids"], **{mistyped: inputs["pixel_values"]})


@torch.no_grad()
def test_arguments_of_the_language_model_and_of_the_trainer_are_taken(model, inputs):
    expected = model(**inputs).logits
    length = inputs["input_ids"].shape[1]
    positions = torch.arange(length)[None]
    for options in ({"position_ids": positions}, {"cache_position": positions[0]}, {"num_items_in_batch": 3},
                    {"logits_to_keep": 0}, {"head_mask": None}, {"is_causal": True}):  # fmt: skip
        assert torch.equal(model(**inputs, **options).logits, expected), options
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, expected[:, -1:])
    with pytest.raises(TypeError, match=r"no argument 'nonsense'$"):
        model(**inputs, nonsense=3)


@torch.no_grad()
def test_the_loss_is_reduced_as_asked(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["media_locations"], -100)
    losses = {how: model(**inputs, labels=labels, loss_reduction=how).loss for how in ("mean", "sum", "none")}
    count = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(losses["mean"], model(**inputs, labels=labels).loss)
    torch.testing.assert_close(losses["sum"], losses["mean"] * count)
    assert losses["none"].shape == (1, labels.shape[1] - 1)
    torch.testing.assert_close(losses["none"].sum(), losses["sum"])
    with pytest.raises(ValueError, match="loss_reduction='most': give mean, sum or none"):
        model(**inputs, labels=labels, loss_reduction="most")


# ------------------------------------------------------------------------------------------------------- processor
def test_options_of_a_processor_have_an_effect_or_are_refused_by_name(processor):
    for option in ({"nonsense": 3}, {"size": 17}, {"do_resize": False}):
        (name,) = option
        with pytest.raises(InputError, match=f"no option {name}="):
            FlamingoProcessor.from_pretrained(FOLDER, **option)
        with pytest.raises(InputError, match=f"no option {name}="):
            processor(images=PICTURES[0], text=PROMPT, **option)
    with pytest.raises(InputError, match="no option nonsense=3"):
        AutoProcessor.from_pretrained(FOLDER, nonsense=3)
    same = FlamingoProcessor.from_pretrained(FOLDER, use_fast=True, trust_remote_code=False, revision=None)
    assert same.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert FlamingoProcessor.from_pretrained(FOLDER, chat_template="{{ 1 }}").chat_template == "{{ 1 }}"
    cut = processor(text=PROMPT, text_kwargs={"truncation": True, "max_length": 2})
    assert cut["input_ids"].shape == (1, 2)


def test_the_ids_of_a_processor_are_those_of_its_tokenizer(processor):
    processor.tokenizer.pad_token = "a"
    a = processor.tokenizer.convert_tokens_to_ids("a")
    assert processor.pad_token_id == a
    assert processor(text=["a cat and", "a"])["input_ids"][1, 0] == a
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"has no pad token: set processor\.tokenizer\.pad_token"):
        processor(text=["a cat and", "a"])
    other = FlamingoProcessor.from_pretrained(FOLDER).tokenizer
    processor.tokenizer = other
    assert processor.pad_token_id == other.pad_token_id
    assert processor.begin_ids == other("").input_ids


# ---------------------------------------------------------------------------------------------- exchanged embeddings
@pytest.mark.parametrize("how", ["set_input_embeddings", "set_output_embeddings", "resize", "added"])
def test_a_model_whose_tables_were_exchanged_is_not_written_as_one_that_cannot_be_read(how, tmp_path):
    model = FlamingoModel.from_pretrained(FOLDER)
    if how == "set_input_embeddings":
        model.set_input_embeddings(nn.Embedding(1078, 192))
    elif how == "set_output_embeddings":
        model.set_output_embeddings(nn.Linear(192, 1078, bias=False))
    elif how == "resize":
        model.flamingo.lang_encoder.resize_token_embeddings(1100)
    else:
        model.flamingo.my_head = nn.Linear(3, 3)
    with pytest.raises(InputError, match="has other tensors than its config describes"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# -------------------------------------------------------------------------------------------------------- pipelines
def chat(picture, words: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": words}]}]


def test_a_pipeline_takes_pictures_in_every_form_of_a_list(model, processor):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    alone = [pipe(images=one, text=PROMPT, max_new_tokens=4)[0]["generated_text"] for one in PICTURES[:2]]
    assert alone[0] != alone[1]
    for pictures in (PICTURES[:2], [[one] for one in PICTURES[:2]], tuple(PICTURES[:2])):
        for size in (1, 2):
            found = pipe(images=pictures, text=[PROMPT, PROMPT], max_new_tokens=4, batch_size=size)
            assert [one["generated_text"] for one in found] == alone
    both = pipe(images=PICTURES[:2], text="<image> a cat<|endofchunk|><image> a", max_new_tokens=4)
    assert len(both) == 1
    with pytest.raises(ValueError, match="text 0 has 1 <image> tags but 2 pictures"):
        pipe(images=PICTURES[:2], text=PROMPT)


def test_chats_of_unequal_length_get_the_same_answers_in_a_batch(model, processor):
    """A pipeline fills texts up on the side that the tokenizer names: the left, for a text that is to go on."""
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [chat(PICTURES[0], "As a list:"), chat(PICTURES[1], "In a sentence: a"), chat(PICTURES[2], "")]
    options = {"max_new_tokens": 8, "return_full_text": False}
    alone = [pipe(text=one, **options)[0]["generated_text"] for one in chats]
    together = [answer["generated_text"] for (answer,) in pipe(text=chats, batch_size=3, **options)]
    assert together == alone


def test_a_processor_of_a_config_is_at_the_model(model, processor):
    for wrong in (lambda: FlamingoProcessor(model.config), lambda: FlamingoProcessor(model.config, device="cpu")):
        with pytest.raises(TypeError, match=r"FlamingoModel\(config\)\.processor"):
            wrong()
    again = FlamingoModel(model.config).processor
    shown = {"images": PICTURES[:1], "text": PROMPT}
    for name, value in processor(**shown).items():
        assert torch.equal(again(**shown)[name], value)
