"""Everyday use of a FlamingoModel: threads, loops written by hand, embeddings, attentions, chats, odd pictures."""

import threading
import time

import numpy as np
import pytest
import torch
from transformers import DynamicCache, pipeline

from flamingo import FlamingoModel, FlamingoProcessor, InputError
from flamingo.classroom import scenes
from flamingo.data.chunks import Chunk
from flamingo.files import asset
from flamingo.interop import compat
from flamingo.interop.threads import one_at_a_time

FOLDER = asset("classroom/flamingo")
PICTURES = [scenes.make_scene(0, "test", i).draw() for i in range(3)]
PROMPT = "<image> As a list:"


@pytest.fixture(scope="module")
def model() -> FlamingoModel:
    return FlamingoModel.from_pretrained(FOLDER, attn_implementation="eager")


@pytest.fixture(scope="module")
def processor() -> FlamingoProcessor:
    return FlamingoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def inputs(processor):
    return processor(images=PICTURES[:1], text=PROMPT)


# --------------------------------------------------------------------------------------------------------- threads
def test_threads_that_share_a_model_get_the_captions_of_their_own_pictures(model, processor):
    alone = [model.generate_captions(processor, images=picture, prompt=PROMPT) for picture in PICTURES]
    assert len({caption for (caption,) in alone}) == 3
    found, start = {i: [] for i in range(3)}, threading.Barrier(3)

    def caption(i: int) -> None:
        start.wait()
        for _ in range(5):
            found[i].append(model.generate_captions(processor, images=PICTURES[i], prompt=PROMPT))

    threads = [threading.Thread(target=caption, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [alone[i]] * 5 for i in range(3)}


def test_threads_take_turns_at_the_tokenizer(processor):
    """Older ones fail when a second comes, whichever of the two ways of the processor it takes."""

    class OneAtATime:
        busy, seen_busy = False, False
        __getattr__ = lambda self, name: getattr(processor.tokenizer, name)  # noqa: E731

        def __call__(self, *texts, **how):
            self.seen_busy |= self.busy
            self.busy = True
            time.sleep(0.01)  # here another thread may come
            self.busy = False
            return processor.tokenizer(*texts, **how)

    tokenizer = OneAtATime()
    sharing, found = FlamingoProcessor(tokenizer, processor.image_processor), {}

    def read(i: int) -> None:
        found[i] = sharing(text=[f"<image> {i} things"])["input_ids"], sharing.encode_chunks([Chunk(0, f"{i} things")])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not tokenizer.seen_busy
    for i, (ids, (of_chunks, _)) in found.items():
        assert ids.equal(processor(text=[f"<image> {i} things"])["input_ids"]), i
        assert of_chunks == processor.encode_chunks([Chunk(0, f"{i} things")])[0], i


def test_a_model_that_its_own_callback_calls_again_says_so(model, inputs):
    with pytest.raises(RuntimeError, match="called again, by a callback of its own"):
        model.generate(**inputs, stopping_criteria=[lambda ids, scores: model(**inputs) is None])
    assert model.generate(**inputs, max_new_tokens=1) is not None  # and is free again


def test_a_thread_that_fails_leaves_the_model_to_others():
    module = torch.nn.Linear(1, 1)
    with pytest.raises(KeyError), one_at_a_time(module):
        raise KeyError
    with one_at_a_time(module):
        pass


# ---------------------------------------------------------------------------------------------------- by hand
@torch.no_grad()
@pytest.mark.parametrize("given_again", [True, False])
def test_a_decode_loop_written_by_hand_sees_the_picture_to_the_end(model, processor, given_again):
    inputs = processor(images=PICTURES[:2], text=[PROMPT, "<image> As a story:"])
    expected = model.generate(**inputs, max_new_tokens=6, eos_token_id=-1, suppress_tokens=None)
    output, ids, mask = model(**inputs, use_cache=True), inputs["input_ids"], inputs["attention_mask"]
    for _ in range(5):
        new = output.logits[:, -1:].argmax(dim=-1)
        ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
        pictures = {"pixel_values": inputs["pixel_values"]} if given_again else {}
        output = model(input_ids=new, attention_mask=mask, cache=compat.cache_of(output), use_cache=True,
                       position_ids=(mask.cumsum(1) - 1)[:, -1:], **pictures)  # fmt: skip
    assert torch.equal(torch.cat([ids, output.logits[:, -1:].argmax(dim=-1)], dim=1), expected)


@torch.no_grad()
def test_a_second_picture_may_come_with_a_later_call(model, processor):
    both = processor(images=PICTURES[:2], text="<image> a dog<|endofchunk|><image> a cat")
    whole = model(**both).logits
    cut = 4
    read = model(both["input_ids"][:, :cut], pixel_values=both["pixel_values"][:, :1], use_cache=True)
    rest = model(both["input_ids"][:, cut:], attention_mask=both["attention_mask"], cache=compat.cache_of(read),
                 pixel_values=both["pixel_values"])  # fmt: skip
    torch.testing.assert_close(torch.cat([read.logits, rest.logits], dim=1), whole, atol=1e-4, rtol=1e-4)
    read = model(both["input_ids"][:, :cut], pixel_values=both["pixel_values"][:, :1], use_cache=True)
    with pytest.raises(ValueError, match="2 <image> tokens but 1 pictures"):  # all of the text's pictures are needed
        model(both["input_ids"][:, cut:], cache=compat.cache_of(read), pixel_values=both["pixel_values"][:, 1:])


@torch.no_grad()
def test_a_cache_that_knows_of_no_pictures_is_refused_with_some(model, inputs):
    read = model.flamingo.lang_encoder(inputs["input_ids"], use_cache=True)
    with pytest.raises(ValueError, match="say where its pictures are"):
        model(inputs["input_ids"][:, -1:], cache=compat.cache_of(read), pixel_values=inputs["pixel_values"])


@torch.no_grad()
def test_a_prefix_that_was_read_before_can_be_continued_by_generate(model, inputs):
    expected = model.generate(**inputs, max_new_tokens=5)
    read = model(**{name: value[:, :-1] if value.ndim == 2 else value for name, value in inputs.items()},
                 use_cache=True)  # fmt: skip
    name = next(iter(compat.cache_argument(model.flamingo.lang_encoder, DynamicCache())))
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, **{name: compat.cache_of(read)}), expected)


# ------------------------------------------------------------------------------------------------ forward, generate
@torch.no_grad()
def test_embeddings_with_media_locations_stand_in_for_tokens(model, inputs):
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    embedded |= {name: value for name, value in inputs.items() if name != "input_ids"}
    assert torch.equal(model(**embedded).logits, model(**inputs).logits)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(model.generate(**embedded), model.generate(**inputs)[:, length:])


def test_a_tuple_comes_with_the_loss_first(model, inputs):
    labels = inputs["input_ids"]
    loss, logits, *_ = model(**inputs, labels=labels, return_dict=False)
    expected = model(**inputs, labels=labels)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    assert next(iter(expected)) == "loss"


def test_the_loss_is_divided_by_the_number_it_is_given(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["media_locations"], -100)
    count = (labels[:, 1:] != -100).sum()
    mean, divided = (model(**inputs, labels=labels, num_items_in_batch=n).loss for n in (None, 10))
    torch.testing.assert_close(divided * 10, mean * count)


@torch.no_grad()
def test_labels_may_be_shifted_already(model, inputs):
    labels = inputs["input_ids"]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, model(**inputs, labels=labels).loss)
    last = torch.full_like(labels, -100)
    last[:, -1] = 7  # of the last token too, which labels of the same tokens cannot say
    expected = -model(**inputs).logits[0, -1].log_softmax(dim=-1)[7]
    torch.testing.assert_close(model(**inputs, labels=labels, shift_labels=last).loss, expected)


@torch.no_grad()
def test_attentions_to_text_and_to_pictures_are_returned(model, inputs):
    output = model(**inputs, output_attentions=True)
    length, layers = inputs["input_ids"].shape[1], len(model.get_modified_layers())
    assert all(weights.shape[-2:] == (length, length) for weights in output.attentions)
    assert len(output.cross_attentions) == layers and output.cross_attentions[0].shape[2:] == (length, 16)
    seen = inputs["media_locations"].cumsum(dim=1) > 0  # rows behind <image> sum to 1, those before it to 0
    for weights in output.cross_attentions:
        torch.testing.assert_close(weights.sum(dim=-1), seen[:, None].float().expand(weights.shape[:3]))
    model.set_attn_implementation("sdpa")  # which keeps none: eager takes its place for this call
    for name in ("attentions", "cross_attentions"):
        for one, other in zip(model(**inputs, output_attentions=True)[name], output[name], strict=True):
            torch.testing.assert_close(one, other)
    assert model.flamingo.lang_encoder.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")


@torch.no_grad()
def test_generate_gives_the_attentions_of_each_step(processor):
    """With sdpa as the default attention, and left padding: those of `forward` on the whole text."""
    model = FlamingoModel.from_pretrained(FOLDER)
    inputs = processor(images=PICTURES[:2], text=[PROMPT, "<image> a"])
    made = model.generate(**inputs, max_new_tokens=4, output_attentions=True, return_dict_in_generate=True)
    length, new, layers = inputs["input_ids"].shape[1], len(made.attentions), len(model.get_modified_layers())
    assert len(made.cross_attentions) == new and {len(step) for step in made.cross_attentions} == {layers}
    assert [step[0].shape[2:] for step in made.attentions] == [(1 if i else length, length + i) for i in range(new)]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, new - 1), value=1)
    read = {"input_ids": made.sequences[:, :-1], "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    whole = model(**read, output_attentions=True).cross_attentions
    for layer in range(layers):
        found = torch.cat([step[layer] for step in made.cross_attentions], dim=2)
        torch.testing.assert_close(found, whole[layer], atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="output_attentions needs one token a step"):
        model.generate(**inputs, output_attentions=True, return_dict_in_generate=True, assistant_model=model)


def test_what_would_lay_the_pictures_beside_another_text_is_refused(model, inputs):
    with pytest.raises(ValueError, match="guidance_scale is not offered"):
        model.generate(**inputs, guidance_scale=1.5)


def test_generation_config_is_used_and_arguments_go_before_it(inputs):
    model = FlamingoModel.from_pretrained(FOLDER)
    length = inputs["input_ids"].shape[1]
    model.generation_config.max_new_tokens = 2
    assert model.generate(**inputs).shape[1] == length + 2
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == length + 3
    model.generation_config.max_new_tokens = None
    assert model.generate(**inputs, max_length=length + 1, max_new_tokens=None).shape[1] == length + 1
    assert model.generate(inputs=inputs["input_ids"], pixel_values=inputs["pixel_values"], max_new_tokens=1) is not None


def test_a_flamingo_can_assist_a_flamingo(model, inputs):
    helper = FlamingoModel.from_pretrained(FOLDER)
    expected = model.generate(**inputs, max_new_tokens=12)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, assistant_model=helper), expected)


# ------------------------------------------------------------------------------------------------------- processor
def test_arrays_of_numpy_and_torch_are_pictures(processor):
    expected = processor(images=PICTURES[0])["pixel_values"]
    array = np.array(PICTURES[0])
    for picture in (array, torch.tensor(array), torch.tensor(array).permute(2, 0, 1), array.astype("float32") / 255):
        assert torch.equal(processor(images=picture)["pixel_values"], expected)
    both = processor(images=np.stack([array, array]), text=["<image> a", "<image> b"])["pixel_values"]
    assert torch.equal(both[1], expected[0])
    assert processor(images=array[..., 0])["pixel_values"].shape == expected.shape
    with pytest.raises(InputError, match=r"an array of shape \(5, 5, 5\) cannot be read as a picture"):
        processor(images=np.zeros((5, 5, 5), dtype="uint8"))


@torch.no_grad()
@pytest.mark.parametrize("images", [PICTURES[:1], [PICTURES[:1], []], [PICTURES[0], None], [PICTURES[:1], None]])
def test_a_text_without_pictures_may_stand_beside_one_with_some(model, processor, images):
    together = processor(images=images, text=[PROMPT, "once upon a time"], padding_side="right")
    alone = processor(text="once upon a time")
    length = alone["input_ids"].shape[1]
    torch.testing.assert_close(model(**together).logits[1, :length], model(**alone).logits[0], atol=1e-4, rtol=1e-4)


def test_padding_and_truncation_are_those_of_transformers(processor):
    shape = lambda text, **options: tuple(processor(text=text, **options)["input_ids"].shape)  # noqa: E731
    assert shape("a cat", padding="max_length", max_length=9) == (1, 9)
    assert shape("a cat", padding="longest") == (1, 3) == shape("a cat", padding=False)
    assert shape("a cat and an apple", truncation=True, max_length=4) == (1, 4)
    assert shape("a cat and an apple", truncation=False, max_length=4) == (1, 6)
    assert shape("a cat and an apple", padding="max_length", max_length=4) == (1, 6)
    assert shape("a cat and an apple", padding="max_length", truncation=True, max_length=4) == (1, 4)
    with pytest.raises(ValueError, match="padding='max_length' with max_length=None"):
        processor(text="a", padding="max_length")


def test_a_processor_can_be_printed(processor):
    assert "FlamingoProcessor" in repr(processor) and "open_clip" in repr(processor)


CHAT = [{"role": "user", "content": [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "As a list:"}]}]


def test_a_chat_has_an_image_token_where_the_picture_stands(processor, inputs, tmp_path):
    answered = [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "blue: cat"}]}, *CHAT]
    text = processor.apply_chat_template(answered, tokenize=False)
    assert text == "<image> As a list: blue: cat<|endofchunk|><image> As a list:"
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(CHAT, **options)
    assert batch.keys() == inputs.keys() and all(torch.equal(batch[name], inputs[name]) for name in inputs)
    processor = FlamingoProcessor.from_pretrained(FOLDER)
    processor.chat_template = "{{ messages | length }}"
    processor.save_pretrained(tmp_path)
    assert FlamingoProcessor.from_pretrained(tmp_path).chat_template == processor.chat_template


def test_the_pipeline_answers_a_chat_and_a_text(model, processor, inputs):
    expected = processor.decode(model.generate(**inputs, max_new_tokens=8)[0])
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    assert pipe(images=PICTURES[0], text=PROMPT, max_new_tokens=8)[0]["generated_text"].strip() == (
        f"{PROMPT} {expected.partition(':')[2].strip()}"
    )
    (answer,) = pipe(text=CHAT, max_new_tokens=8, return_full_text=False)
    assert answer["generated_text"].strip() == expected.partition(":")[2].strip()


# ------------------------------------------------------------------------------------------------------- abilities
def test_gradient_checkpointing_gives_the_same_gradients(inputs):
    model = FlamingoModel.from_pretrained(FOLDER).train()
    labels = inputs["input_ids"].masked_fill(inputs["media_locations"], -100)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters_trainable()]

    plain = gradients()
    calls = []
    block = model.get_modified_layers()[0].gated_cross_attn_layer
    block.register_forward_hook(lambda *_: calls.append(1))
    for switch, forwards in (("enable", 2), ("disable", 1)):
        name = (
            "activation_checkpointing_"
            if hasattr(model, "activation_checkpointing_enable")
            else "gradient_checkpointing_"
        )
        getattr(model, name + switch)()
        calls.clear()
        for one, other in zip(gradients(), plain, strict=True):
            torch.testing.assert_close(one, other)
        assert len(calls) == forwards  # once more going backward


@torch.no_grad()
def test_forward_can_be_exported(model, inputs):
    exported = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
    found = exported.module()(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8), reason="this torch traces no context managers"
)
@torch.no_grad()
def test_forward_can_be_compiled_as_one_graph(model, inputs):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_a_static_cache_gives_the_same_text(model, inputs):
    expected = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, cache_implementation="static"), expected)
