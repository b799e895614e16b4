"""Any causal language model can be extended: the same promises for every family, with tiny random weights."""

import copy

import pytest
import torch
from conftest import EOC, IMAGE, PAD, TinyEncoder, assemble, open_the_gates
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from flamingo.fast.enable import enable
from flamingo.fast.packing import PACKABLE
from flamingo.interop.compat import find_decoder_layers
from flamingo.model.vlm import VisionLanguageModel

COMMON = {"vocab_size": 50, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 2}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "opt": WIDE | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "opt with narrow words": WIDE | {"ffn_dim": 64, "word_embed_proj_dim": 16, "model_type": "opt"},
    "gpt2": GPT2,
    "gptj": GPT2 | {"rotary_dim": 4},
    "gpt_neox": WIDE | {"intermediate_size": 64},
    "llama": WIDE | {"intermediate_size": 64, "num_key_value_heads": 2},
    "mistral": WIDE | {"intermediate_size": 64, "num_key_value_heads": 2},
    "qwen2": WIDE | {"intermediate_size": 64, "num_key_value_heads": 2},
    "falcon": WIDE | {"new_decoder_architecture": False, "alibi": False},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "biogpt": WIDE | {"intermediate_size": 64},
    "granite": WIDE | {"intermediate_size": 64, "num_key_value_heads": 4, "logits_scaling": 3.0},  # after the head
    "stablelm": WIDE | {"intermediate_size": 64, "num_key_value_heads": 4},  # not in the table: found by structure
}


def tiny_lm_of(family: str) -> nn.Module:
    settings = COMMON | FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type", family), **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def extended(lm: nn.Module, *, open_gates: bool = True, fast: bool = False, **flat) -> VisionLanguageModel:
    torch.manual_seed(0)
    shape = {
        "xattn_dim_head": 8, "xattn_heads": 2, "resampler_depth": 1, "resampler_dim_head": 8, "resampler_heads": 2,
        "resampler_num_latents": 3,
    } | flat  # fmt: skip
    model = assemble(TinyEncoder(), lm, **shape)
    if open_gates:
        open_the_gates(model)
    if fast:
        enable(model)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_identity_at_the_start(family, texts, pictures):
    lm = tiny_lm_of(family)
    plain = copy.deepcopy(lm)
    ids = texts.masked_fill(texts >= EOC, 7)  # words the plain model knows
    model = extended(lm, open_gates=False)
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        with model.reading(model.prepare_images(pixel_values=pictures), ids):
            after = model.lang_encoder(input_ids=ids).logits
    assert torch.equal(before, after[..., : before.shape[-1]])


def test_one_step_moves_what_trains_and_nothing_else(family, texts, pictures):
    model = extended(tiny_lm_of(family)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    model(texts, labels=texts, pixel_values=pictures).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    added = ("perceiver.", "gated_cross_attn_layer.", "additional_")
    assert {name for name in before if any(part in name for part in added)} == moved


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@torch.no_grad()
def test_the_loss_is_that_of_the_logits_it_gives(family, texts, pictures, fast):
    model = extended(tiny_lm_of(family), fast=fast)
    logits = model(texts, pixel_values=pictures).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten())
    torch.testing.assert_close(model(texts, labels=texts, pixel_values=pictures).loss, expected)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_padding_changes_neither_loss_nor_gradient_nor_takes_work(family, pictures, fast):
    """A long text and a short one trained on together: as each by itself. Packed, where the family allows it."""
    model = extended(tiny_lm_of(family), fast=fast).train()
    rows = [[2, IMAGE, 11, 12, EOC, IMAGE, 13, 14], [2, 7, IMAGE, 21]]
    ids = torch.tensor([row + [PAD] * (8 - len(row)) for row in rows])
    mask, index = (ids != PAD).long(), torch.tensor([[0, 1], [2, -1]])
    labels = ids.masked_fill(ids < 10, -100)
    bank, widths = pictures.flatten(0, 1), []
    layer = model.lang_encoder._get_decoder_layers()[0]
    watch = layer.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape[:2])))
    model(ids, mask, labels, pixel_values=bank, image_index=index).loss.backward()
    packed = fast and model.lang_encoder.config.model_type in PACKABLE
    assert widths == [(1, 12) if packed else (2, 8)]
    watch.remove()
    together = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    targets = [(labels[i, 1:] != -100).sum() for i in range(2)]
    for i, row in enumerate(rows):
        real = slice(0, len(row))
        one = slice(i, i + 1)
        part = model(ids[one, real], labels=labels[one, real], pixel_values=bank, image_index=index[one])
        (part.loss * targets[i] / sum(targets)).backward()
    apart = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_cached_steps_equal_the_full_forward(family, texts, pictures):
    model = extended(tiny_lm_of(family))
    prompt = texts[:, :4]
    made = model.generate(
        prompt,
        pixel_values=pictures,
        max_new_tokens=5,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = model(made.sequences, pixel_values=pictures).logits
    torch.testing.assert_close(torch.stack(made.logits, dim=1), whole[:, 3:-1], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_batch_equals_one_by_one_and_a_beam_of_one_is_greedy(family, pictures):
    model = extended(tiny_lm_of(family))
    rows = [[2, IMAGE, 11], [2, 7, 9, IMAGE, 21, 22]]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 4, "eos_token_id": -1}
    together = model.generate(ids, mask, pixel_values=pictures[:, :1], **options)
    uncached = model.generate(ids, mask, pixel_values=pictures[:, :1], use_cache=False, **options)
    assert torch.equal(together, uncached)
    for i, row in enumerate(rows):
        one = pictures[i : i + 1, :1]
        alone = model.generate(torch.tensor([row]), pixel_values=one, **options)
        assert torch.equal(alone[0, len(row) :], together[i, longest:])
        beam = model.generate(torch.tensor([row]), pixel_values=one, num_beams=1, **options)
        assert torch.equal(alone, beam)


def test_saved_and_loaded_it_is_the_same(family, texts, pictures):
    one = extended(tiny_lm_of(family))
    other = extended(tiny_lm_of(family), resampler_latents_std=2.0, open_gates=False)
    with torch.no_grad():
        assert not torch.equal(one(texts, pixel_values=pictures).logits, other(texts, pixel_values=pictures).logits)
        other.load_state_dict(one.trainable_state_dict(), strict=False)
        assert torch.equal(one(texts, pixel_values=pictures).logits, other(texts, pixel_values=pictures).logits)


@torch.no_grad()
def test_candidates_are_scored_as_the_full_forward_scores_them(family, pictures):
    model = extended(tiny_lm_of(family))
    prompts = torch.tensor([[PAD, 2, IMAGE, 11], [2, 7, IMAGE, 21]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    candidates = [[5, 6, 7], [8]]
    scores = model.score_sequences(prompts, candidates, mask, pixel_values=pictures[:, :1])
    for b in range(2):
        for k, candidate in enumerate(candidates):
            real = prompts[b][mask[b].bool()].tolist()
            ids = torch.tensor([real + candidate])
            logits = model(ids, pixel_values=pictures[b : b + 1, :1]).logits.log_softmax(-1)[0]
            expected = sum(logits[len(real) - 1 + j, token] for j, token in enumerate(candidate))
            torch.testing.assert_close(scores[b, k], expected, atol=1e-4, rtol=1e-4)


def test_an_unknown_structure_asks_for_the_option():
    lm = tiny_lm_of("llama")
    lm.config.model_type = "unheard-of"
    lm.more = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    with pytest.raises(ValueError, match="decoder_layers_attr_name"):
        find_decoder_layers(lm)
    assert extended(lm, decoder_layers_attr_name="model.layers").gates()
