"""Everything `generate` can do, on a FlamingoModel: what comes out is what `forward` says of the same text.

transformers has tests of this kind for its own models, but its source distribution leaves them out; so these are ours.
"""

import pytest
import torch
from transformers import LogitsProcessor, TextIteratorStreamer

from flamingo import FlamingoModel, FlamingoProcessor
from flamingo.classroom import scenes
from flamingo.files import asset

FOLDER = asset("classroom/flamingo")
PICTURES = [scenes.make_scene(0, "test", i).draw() for i in range(3)]
PROMPT = "<image> As a list:"
NEW = 6


@pytest.fixture(scope="module")
def model() -> FlamingoModel:
    return FlamingoModel.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def processor() -> FlamingoProcessor:
    return FlamingoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def inputs(processor):
    """Two texts of unequal length, padded on the left."""
    return processor(images=PICTURES[:2], text=[PROMPT, "<image> a"])


def generate(model, inputs, **options):
    """Always NEW tokens, so that lengths are known; nothing is suppressed, so that logits are those of `forward`."""
    fixed = {"max_new_tokens": NEW, "min_new_tokens": None, "eos_token_id": -1, "suppress_tokens": None}
    return model.generate(**inputs, **(fixed | options))


@torch.no_grad()
def read(model, inputs, sequences):
    """`forward` on prompt and continuation at once, with the hidden states."""
    mask = torch.nn.functional.pad(
        inputs["attention_mask"], (0, sequences.shape[1] - inputs["input_ids"].shape[1]), value=1
    )
    return model(sequences, attention_mask=mask, pixel_values=inputs["pixel_values"], output_hidden_states=True)


def test_greedy_is_the_likeliest_token_of_forward_with_its_scores_and_hidden_states(model, inputs):
    made = generate(
        model, inputs, return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True
    )
    whole = read(model, inputs, made.sequences)
    length = inputs["input_ids"].shape[1]
    expected = whole.logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, dim=1), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(torch.stack(made.scores, dim=1), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(made.sequences[:, length:], expected.argmax(dim=-1))
    for layer, states in enumerate(whole.hidden_states):
        found = torch.cat([step[layer] for step in made.hidden_states], dim=1)
        seen = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[:, length:], states[:, length:-1], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found[:, :length][seen], states[:, :length][seen], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}, {"num_beams": 1}],
    ids=["no cache", "static cache", "prompt in pieces", "one beam"],
)  # fmt: skip
def test_the_way_it_is_computed_does_not_change_the_text(model, inputs, options):
    assert torch.equal(generate(model, inputs, **options), generate(model, inputs))


def test_padding_does_not_change_the_text(model, processor, inputs):
    for row, (picture, text) in enumerate(zip(PICTURES, [PROMPT, "<image> a"], strict=False)):
        alone = generate(model, processor(images=picture, text=text))
        assert torch.equal(alone[0, -NEW:], generate(model, inputs)[row, -NEW:])


def test_a_guess_of_later_tokens_does_not_change_the_text(model, processor):
    one = processor(images=PICTURES[0], text="<image> red: cat, dog. As a list:")
    expected = generate(model, one)
    assert torch.equal(generate(model, one, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(generate(model, one, assistant_model=FlamingoModel.from_pretrained(FOLDER)), expected)


def test_several_samples_of_a_text_stand_side_by_side(model, processor, inputs):
    """A temperature near 0 leaves no choice: each sample, and each beam, is of its own picture."""
    greedy = generate(model, inputs)
    sampled = generate(model, inputs, do_sample=True, temperature=1e-4, num_return_sequences=3)
    assert torch.equal(sampled, greedy.repeat_interleave(3, dim=0))
    alone = [generate(model, processor(images=p, text=PROMPT), num_beams=3, num_return_sequences=2) for p in PICTURES]
    together = generate(model, processor(images=PICTURES, text=[PROMPT] * 3), num_beams=3, num_return_sequences=2)
    assert torch.equal(together, torch.cat(alone))


def test_scores_of_chosen_tokens_are_those_of_forward(model, inputs):
    made = generate(model, inputs, return_dict_in_generate=True, output_scores=True)
    scores = model.compute_transition_scores(made.sequences, made.scores, normalize_logits=True)
    logits = read(model, inputs, made.sequences).logits[:, -NEW - 1 : -1].log_softmax(dim=-1)
    expected = logits.gather(2, made.sequences[:, -NEW:, None])[..., 0]
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)


def test_processors_of_logits_and_stopping_criteria_see_the_text_so_far(model, inputs):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            lengths.append(input_ids.shape[1])
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([9]), 0.0)

    lengths, length = [], inputs["input_ids"].shape[1]
    assert (generate(model, inputs, logits_processor=[Only()])[:, -NEW:] == 9).all()
    assert lengths == list(range(length, length + NEW))
    stopped = generate(model, inputs, stopping_criteria=[lambda ids, scores: ids.shape[1] >= length + 2])
    assert stopped.shape[1] == length + 2


def test_a_streamer_gives_the_text_that_generate_returns(model, processor):
    one = processor(images=PICTURES[0], text=PROMPT)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    made = generate(model, one, streamer=streamer)
    assert "".join(streamer) == processor.decode(made[0, -NEW:], skip_special_tokens=False)
