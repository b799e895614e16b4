"""What a user of the core relies on: identity at the start, who sees what, frozen is frozen, decode equals forward."""

import pytest
import torch
import torch.nn.functional as F
from conftest import EOC, IMAGE, PAD, tiny_flamingo, tiny_lm

from flamingo.config import layers_with_cross_attention
from flamingo.interop import compat
from flamingo.interop.compat import find_decoder_layers
from flamingo.model.added_tokens import decouple_added_tokens
from flamingo.model.cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention, media_attention_mask
from flamingo.model.resampler import PerceiverResampler


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- who sees what
def truth_table(ids, index, only_immediate=True):
    ids = torch.tensor([ids])
    media_mask = media_attention_mask(ids == IMAGE, torch.tensor([index]), only_immediate)
    mask = media_mask.mask if media_mask.mask is not None else media_mask.sees_image
    return mask[0].int().tolist(), media_mask.sees_image[0, :, 0].int().tolist()


def test_a_token_sees_the_last_picture_before_it():
    seen, any_ = truth_table([2, IMAGE, 5, IMAGE, 6], [0, 1])
    assert seen == [[0, 0], [1, 0], [1, 0], [0, 1], [0, 1]]
    assert any_ == [0, 1, 1, 1, 1]


def test_all_earlier_pictures_are_seen_when_asked_for():
    seen, any_ = truth_table([2, IMAGE, 5, IMAGE, 6], [0, 1], only_immediate=False)
    assert seen == [[0, 0], [1, 0], [1, 0], [1, 1], [1, 1]]
    assert any_ == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("only_immediate", [True, False])
def test_empty_slots_are_never_seen(only_immediate):
    seen, _ = truth_table([IMAGE, 5, 6], [4, -1], only_immediate)
    assert [row[1] for row in seen] == [0, 0, 0]


def test_more_image_tokens_than_pictures_is_an_error():
    with pytest.raises(ValueError, match=r"text 0 has 2 <image> tokens but 1 pictures"):
        truth_table([IMAGE, 5, IMAGE], [0, -1])


@pytest.mark.parametrize("only_immediate", [True, False])
def test_text_before_the_first_picture_gets_exactly_zero(only_immediate):
    attention = MaskedCrossAttention(dim=8, dim_visual=6, dim_head=4, heads=2)
    media_locations = torch.tensor([[False, False, True, False, True]])
    media_mask = media_attention_mask(media_locations, torch.tensor([[0, 1]]), only_immediate)
    out = attention(torch.randn(1, 5, 8), attention.project_media(torch.randn(2, 3, 6)), media_mask)
    assert (out[0, :2] == 0).all()
    assert (out[0, 2:] != 0).any(dim=-1).all()


def test_cross_attention_is_softmax_over_the_latents_of_the_one_picture():
    attention = MaskedCrossAttention(dim=8, dim_visual=6, dim_head=8, heads=1)
    x, media = torch.randn(1, 4, 8), torch.randn(2, 3, 6)
    media_mask = media_attention_mask(torch.tensor([[True, False, True, False]]), torch.tensor([[0, 1]]))
    out = attention(x, attention.project_media(media), media_mask)
    q = attention.to_q(attention.norm(x))[0]
    for token, picture in enumerate([0, 0, 1, 1]):
        k, v = attention.to_kv(media[picture]).chunk(2, dim=-1)
        by_hand = (q[token] @ k.T / 8**0.5).softmax(-1) @ v
        close(out[0, token], attention.to_out(by_hand))


# --------------------------------------------------------------------------------------------------- identity
@pytest.mark.parametrize("vocab_size", [50, 60])  # the added tokens behind the table, or inside it as in OPT
def test_before_training_the_model_is_the_language_model_bit_for_bit(texts, pictures, vocab_size):
    model = tiny_flamingo(open_gates=False, vocab_size=vocab_size)
    torch.manual_seed(0)
    from conftest import TinyEncoder

    TinyEncoder()  # draws the same random numbers as tiny_flamingo did
    plain = tiny_lm(vocab_size)
    words = torch.where(texts >= 50, 3, texts)  # the plain model knows no added tokens
    old = [i for i in range(vocab_size) if i not in (IMAGE, EOC)]
    with model.reading(model.prepare_images(pixel_values=pictures), words):
        ours = model.lang_encoder(input_ids=words).logits
    assert torch.equal(ours[..., old], plain(input_ids=words).logits[..., old])
    looked = model(texts, pixel_values=pictures).logits
    assert torch.equal(looked, model(texts, blind=True).logits)


def test_a_gate_block_changes_nothing_at_first():
    block = GatedCrossAttentionBlock(dim=8, dim_visual=6, dim_head=4, heads=2)
    x = torch.randn(2, 3, 8)
    media_mask = media_attention_mask(torch.tensor([[True, False, False]] * 2), torch.tensor([[0], [0]]))
    assert torch.equal(block(x, block.attn.project_media(torch.randn(1, 3, 6)), media_mask), x)


# --------------------------------------------------------------------------------- pictures and their captions
def test_pictures_matter_once_gates_are_open(model, texts, pictures):
    assert not torch.allclose(model(texts, pixel_values=pictures).logits, model(texts, pixel_values=-pictures).logits)


def test_the_second_picture_never_changes_the_first_caption(model, texts, pictures):
    other = pictures.clone()
    other[:, 1] += 1
    a, b = model(texts, pixel_values=pictures).logits, model(texts, pixel_values=other).logits
    assert torch.equal(a[0, :6], b[0, :6])
    assert not torch.allclose(a[0, 6:], b[0, 6:])


def test_five_captions_through_the_bank_equal_five_single_ones(model, pictures):
    picture = pictures[0, 0]  # (F, C, H, W)
    ids = torch.tensor([[2, IMAGE, 10 + k, 11, 12 + k, EOC] for k in range(5)])
    model.vision_encoder.calls = 0
    together = model(ids, pixel_values=picture[None], image_index=torch.zeros(5, 1, dtype=torch.long)).logits
    assert model.vision_encoder.calls == 1
    for k in range(5):
        close(together[k], model(ids[k : k + 1], pixel_values=picture[None, None]).logits[0])


def test_features_and_latents_are_as_good_as_pixels(model, texts, pictures):
    index = torch.arange(4).view(2, 2)
    features = model.encode_images(pictures.flatten(0, 1))
    expected = model(texts, pixel_values=pictures).logits
    close(model(texts, features=features, image_index=index).logits, expected)
    close(model(texts, latents=model.tokenize_images(features), image_index=index).logits, expected)


def test_batched_equals_one_by_one(model, texts, pictures):
    together = model(texts, pixel_values=pictures).logits
    for k in range(2):
        close(together[k], model(texts[k : k + 1], pixel_values=pictures[k : k + 1]).logits[0])


def test_wrong_shapes_and_indices_are_named(model, texts, pictures):
    with pytest.raises(ValueError, match="exactly one"):
        model(texts)
    with pytest.raises(ValueError, match=r"pixel_values must be \(B, T_img, F, C, H, W\)"):
        model(texts, pixel_values=pictures[0])
    with pytest.raises(ValueError, match="picture 7 of 4"):
        model(texts, pixel_values=pictures.flatten(0, 1), image_index=torch.tensor([[0, 1], [2, 7]]))


def test_pictures_of_other_texts_are_refused(model, texts, pictures):
    four = texts.repeat(2, 1)
    with pytest.raises(ValueError, match="4 texts, but pictures for 2"):
        model(four, pixel_values=pictures)
    with pytest.raises(ValueError, match="image_index of text 1 has an empty slot before a picture"):
        model(texts, pixel_values=pictures[:, 0], image_index=torch.tensor([[0, 1], [-1, 1]]))


@torch.no_grad()
def test_a_text_read_in_parts_sees_what_it_sees_at_once(model, texts, pictures):
    """With media_locations of the whole text, whatever the parts are."""
    whole = model(texts, pixel_values=pictures).logits
    images, where = model.prepare_images(pixel_values=pictures), texts == IMAGE
    parts, cache = [], {}
    with model.reading(images, texts, media_locations=where):
        for part in texts.split(2, dim=1):
            read = model.lang_encoder(input_ids=part, use_cache=True, **cache)
            cache = compat.cache_argument(model.lang_encoder, compat.cache_of(read))
            parts.append(read.logits)
    close(torch.cat(parts, dim=1), whole)


def test_conditioning_never_outlives_a_call(model, texts, pictures):
    plain = model.lang_encoder(input_ids=texts).logits
    model(texts, pixel_values=pictures)
    assert torch.equal(model.lang_encoder(input_ids=texts).logits, plain)
    with pytest.raises(ValueError):
        model(torch.full((2, 5), IMAGE), pixel_values=pictures)  # too many <image>
    assert torch.equal(model.lang_encoder(input_ids=texts).logits, plain)
    assert all(layer.vis_x is None for layer in model.lang_encoder._get_decoder_layers())


# ------------------------------------------------------------------------------------------------------ decode
def greedy_by_full_forward(model, ids, steps, **pictures):
    for _ in range(steps):
        logits = model(ids, **pictures).logits[:, -1].clone()
        logits[:, [IMAGE, PAD]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("only_immediate", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_decode_equals_full_forward(texts, pictures, only_immediate, use_cache):
    model = tiny_flamingo(only_attend_immediate_media=only_immediate)
    prompt = texts[:, :8]
    expected = greedy_by_full_forward(model, prompt, 6, pixel_values=pictures)
    options = {"max_new_tokens": 6, "eos_token_id": None, "use_cache": use_cache}
    assert torch.equal(model.generate(prompt, pixel_values=pictures, **options), expected)


def test_left_padding_changes_nothing(model, pictures):
    short, long = [2, IMAGE, 11], [2, 7, 8, IMAGE, 12, 13]
    padded = torch.tensor([[PAD] * 3 + short, long])
    mask = (padded != PAD).long()
    options = {"max_new_tokens": 5, "eos_token_id": None}
    index = torch.tensor([[0], [1]])
    both = model.generate(padded, mask, pixel_values=pictures[0], image_index=index, **options)
    for k, row in enumerate((short, long)):
        alone = model.generate(torch.tensor([row]), pixel_values=pictures[0, k][None, None], **options)
        assert both[k, -5:].tolist() == alone[0, -5:].tolist()


def test_beams_share_one_encoded_picture_and_one_beam_is_greedy(model, pictures):
    prompt = torch.tensor([[2, IMAGE, 11]])
    options = {"max_new_tokens": 5, "eos_token_id": None, "pixel_values": pictures[:1, :1]}
    model.vision_encoder.calls = 0
    model.generate(prompt, num_beams=4, **options)
    assert model.vision_encoder.calls == 1
    assert torch.equal(model.generate(prompt, num_beams=1, **options), model.generate(prompt, **options))


def test_beam_search_finds_what_exhaustive_scoring_ranks_at_least_as_high(model, pictures):
    prompt = torch.tensor([[2, IMAGE, 11]])
    options = {"max_new_tokens": 4, "eos_token_id": None, "pixel_values": pictures[:1, :1]}

    def log_probability(ids):
        logits = model(ids, pixel_values=pictures[:1, :1]).logits.log_softmax(-1)
        return sum(logits[0, t - 1, ids[0, t]].item() for t in range(3, ids.shape[1]))

    greedy = log_probability(model.generate(prompt, **options))
    assert log_probability(model.generate(prompt, num_beams=8, **options)) >= greedy - 1e-4


def test_image_and_padding_are_never_generated(model, pictures):
    with torch.no_grad():  # make <image> by far the likeliest word
        model.lang_encoder.lm_head.additional_fc.weight.mul_(0).add_(100 * torch.ones(2, 32))
    out = model.generate(torch.tensor([[2, IMAGE]]), pixel_values=pictures[:1, :1], max_new_tokens=8, eos_token_id=None)
    assert not set(out[0, 2:].tolist()) & {IMAGE, PAD}


# ---------------------------------------------------------------------------------------------------- training
def one_training_run(model, texts, pictures, steps=3):
    from flamingo.config import TrainingOptions
    from flamingo.training.optimizer import make_optimizer

    options = TrainingOptions(weight_decay=0.5)
    optimizer = make_optimizer(model.train(), options)
    labels = texts.masked_fill(texts == IMAGE, -100)
    for _ in range(steps):
        loss = model(texts, labels=labels, pixel_values=pictures).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("vocab_size", [50, 60])
def test_training_moves_what_trains_and_nothing_else(texts, pictures, vocab_size):
    model = tiny_flamingo(open_gates=False, vocab_size=vocab_size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = one_training_run(model, texts, pictures)
    trained = set(model.trainable_state_dict())
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved <= trained
    assert {name for name in trained if "perceiver" not in name or "frame_embs" not in name} - moved == set()
    assert any("additional_embedding" in name for name in trained)
    assert model.lang_encoder.get_input_embeddings().weight.grad is None
    in_optimizer = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert in_optimizer == sum(value.numel() for value in model.trainable_state_dict().values())


def test_only_matrices_decay_and_gates_have_their_own_rate(model):
    from flamingo.config import TrainingOptions
    from flamingo.training.optimizer import make_optimizer

    options = TrainingOptions(lr=1e-3, gate_lr=0.03, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in make_optimizer(model, options).param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            is_gate = name.endswith("_gate")
            assert group["lr"] == (0.03 if is_gate else 1e-3)
            kept = is_gate or parameter.ndim < 2 or any(x in name for x in ("latents", "additional", "frame_embs"))
            assert group["weight_decay"] == (0.0 if kept else 0.1), name


def test_the_first_gate_is_opened_again_when_lookups_begin_and_the_gates_learn_slowly_from_then_on(model):
    from flamingo.config import TrainingOptions
    from flamingo.training.optimizer import REOPENING, make_optimizer, open_gates, set_learning_rate

    options = TrainingOptions(steps=100, lr=1e-3, gate_lr=0.03, warmup_steps=4, gate_opening=0.3, gate_reopening=0.2)
    adamw = make_optimizer(model, options)

    def attention_gates_at(step):
        open_gates(model, step, options, reopening=40)
        return [pytest.approx(gate, abs=1e-6) for gate, _ in model.gates()]

    def gate_rate_at(step, reopening):
        set_learning_rate(adamw, step, options, reopening)
        rates = {group["lr"] for group in adamw.param_groups}
        return max(rates) / min(rates)

    first, *others = attention_gates_at(3)
    assert first == 0.3 and set(map(lambda gate: gate == 0.3, others)) == {True}
    for block in model.cross_attention_blocks():
        block.attn_gate.data.zero_()
    assert attention_gates_at(39)[0] == 0
    assert attention_gates_at(40)[0] == 0.2 / REOPENING
    first, *others = attention_gates_at(39 + REOPENING)
    assert first == 0.2 and all(gate == 0 for gate in others)
    model.cross_attention_blocks()[0].attn_gate.data.zero_()
    assert attention_gates_at(40 + REOPENING)[0] == 0
    assert gate_rate_at(39, 40) == pytest.approx(30) and gate_rate_at(40, 40) == pytest.approx(1 / 0.6)
    assert gate_rate_at(40, None) == pytest.approx(30)  # a set without a curriculum


def test_the_first_look_alone_is_asked_where_things_stand(model, texts, pictures):
    """A loss of its own, in training only; it reaches the first look and what it looks at, and nothing behind them."""
    from flamingo.training.where import ask_where

    places = torch.tensor([[0, 5, 6], [1, 7, 8]])
    assert not ask_where(model, 0.0) and ask_where(model.train(), 0.5)
    pixels = {"pixel_values": pictures.flatten(0, 1), "image_index": torch.arange(4).view(2, 2)}
    labels = torch.full_like(texts, -100)  # no other loss
    model(texts, labels=labels, places=places, **pixels).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    first = "lang_encoder.model.decoder.layers.0.gated_cross_attn_layer.attn."
    assert {first + f"{part}.weight" for part in ("to_q", "to_kv", "to_out")} <= reached
    assert all(name.startswith((first, "perceiver.")) for name in reached)
    labels = texts.clone()
    torch.manual_seed(0)
    asked = model(texts, labels=labels, places=places, **pixels).loss
    model.where_weight = 0.0
    assert asked > model(texts, labels=labels, places=places, **pixels).loss
    model.eval().where_weight = 0.5
    close(model(texts, labels=labels, places=places, **pixels).loss, model(texts, labels=labels, **pixels).loss)
    assert model.images_seen is None  # keeps no graph alive


def test_where_is_not_asked_of_a_model_whose_words_are_narrower_than_its_layers():
    from transformers import OPTConfig, OPTForCausalLM

    from flamingo.errors import InputError
    from flamingo.training.where import ask_where

    config = OPTConfig(
        vocab_size=50, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=1,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"16 channels and its layers 32.*--where-weight 0"):
        ask_where(tiny_flamingo(lm=OPTForCausalLM(config)), 0.5)


def test_hidden_states_come_with_a_loss_too(model, texts, pictures):
    output = model(texts, labels=texts, pixel_values=pictures, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and output.loss.isfinite()


def test_more_tokens_than_positions_are_refused_before_the_first_step(model, texts, pictures):
    for options in ({"max_new_tokens": 200}, {"max_length": 200}):
        with pytest.raises(ValueError, match="the language model has 128"):
            model.generate(texts, pixel_values=pictures, **options)


def test_asked_where_things_stand_the_first_look_learns_it(model):
    from flamingo.training.where import where_loss

    torch.manual_seed(0)
    latents = torch.randn(8, 3, model.vision_tokenizer.dim)
    places = torch.tensor([[picture, 5 + picture % 2, 7 + picture % 3] for picture in range(8)])
    look = model.cross_attention_blocks()[0].attn
    adamw = torch.optim.AdamW(look.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        losses.append(where_loss(model.lang_encoder, look, latents, places))
        losses[-1].backward()
        adamw.step()
        adamw.zero_grad()
    assert losses[-1] < 0.2 * losses[0]


def test_loss_is_that_of_the_labelled_tokens_only(model, texts, pictures):
    labels = torch.full_like(texts, -100)
    labels[0, 3], labels[1, 8] = texts[0, 3], texts[1, 8]
    out = model(texts, labels=labels, pixel_values=pictures)
    full = model(texts, pixel_values=pictures).logits
    by_hand = F.cross_entropy(torch.stack([full[0, 2], full[1, 7]]), torch.stack([texts[0, 3], texts[1, 8]]))
    close(out.loss, by_hand)


def test_a_batch_without_targets_has_zero_loss_and_zero_gradient(model, texts, pictures):
    loss = model(texts, labels=torch.full_like(texts, -100), pixel_values=pictures).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_frozen_parts_stay_in_eval_mode(model):
    model.train()
    assert not any(module.training for module in (*model.vision_encoder.modules(), *model.lang_encoder.modules()))
    assert model.perceiver.training


def test_a_language_model_that_trains_is_in_train_mode_and_all_of_it_moves(texts, pictures):
    model = tiny_flamingo()
    model.train_language_model(True)
    assert not model.lang_encoder.training and model.train().lang_encoder.training
    assert not model.vision_encoder.training and not model.eval().lang_encoder.training
    model.train()
    before = {name: value.clone() for name, value in model.lang_encoder.named_parameters()}
    one_training_run(model, texts, pictures, steps=1)
    assert not any(torch.equal(before[n], p) for n, p in model.lang_encoder.named_parameters() if "fc1.weight" in n)
    model.train_language_model(False)
    assert not model.lang_encoder.training and set(model.trainable_state_dict()) == set(
        tiny_flamingo().trainable_state_dict()
    )


# --------------------------------------------------------------------------------------------------- resampler
@pytest.mark.parametrize("act", ["gelu", "relu", "sqrelu"])
def test_resampler_gives_n_latents_whatever_comes_in(act):
    resampler = PerceiverResampler(dim=12, depth=2, dim_head=4, heads=2, num_latents=5, act=act)
    for frames, patches in ((1, 4), (3, 7)):
        assert resampler(torch.randn(2, frames, patches, 12)).shape == (2, 5, 12)
    with pytest.raises(ValueError, match="unknown activation"):
        PerceiverResampler(dim=12, act="swish")


def test_frames_are_told_apart_by_time_embeddings_only():
    torch.manual_seed(0)
    video = torch.randn(1, 2, 4, 12)
    backwards = video.flip(1)
    without = PerceiverResampler(dim=12, depth=1, dim_head=4, heads=2, num_latents=3)
    close(without(video), without(backwards))
    with_time = PerceiverResampler(dim=12, depth=1, dim_head=4, heads=2, num_latents=3, max_num_frames=2)
    assert not torch.allclose(with_time(video), with_time(backwards))
    with pytest.raises(ValueError, match="3 frames"):
        with_time(torch.randn(1, 3, 4, 12))


def test_media_time_embeddings_follow_the_place_in_the_text(texts, pictures):
    model = tiny_flamingo(resampler_max_num_media=2)
    same = pictures[:, :1].expand(-1, 2, -1, -1, -1, -1)
    index = torch.tensor([[0, 1], [2, 3]])
    latents = model.tokenize_images(model.encode_images(same.flatten(0, 1)), index)
    assert not torch.allclose(latents[0], latents[1])  # one picture in two places
    with pytest.raises(ValueError, match="same place in every text"):
        model(texts, pixel_values=pictures.flatten(0, 1), image_index=torch.tensor([[0, 1], [1, 0]]))
    three = torch.tensor([[2, IMAGE, 5, IMAGE, 6, IMAGE, 7]])
    with pytest.raises(ValueError, match="max_num_media is 2"):
        model(three, pixel_values=torch.randn(1, 3, 1, 3, 8, 8))


# ---------------------------------------------------------------------------------------------------- the mixin
def test_layers_and_class_of_an_extended_model(model):
    lm = model.lang_encoder
    assert [cls.__name__ for cls in type(lm).__mro__[:3]] == [
        "FlamingoOPTForCausalLM",
        "FlamingoLMMixin",
        "OPTForCausalLM",
    ]
    assert type(lm).__module__ == "flamingo.model.language_model"
    assert len(lm._get_decoder_layers()) == 2
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert "lang_encoder.model.decoder.layers.0.gated_cross_attn_layer.attn.to_kv.weight" in names
    assert "lang_encoder.model.decoder.layers.0.decoder_layer.fc1.weight" in names
    assert "perceiver.layers.0.0.to_kv.weight" in names
    import inspect

    assert "attention_mask" in inspect.signature(lm.forward).parameters


def test_which_layers_get_cross_attention():
    assert layers_with_cross_attention(6, 1) == [0, 1, 2, 3, 4, 5]
    assert layers_with_cross_attention(6, 3, "near") == [0, 3]
    assert layers_with_cross_attention(6, 3, "far") == [2, 5]
    with pytest.raises(ValueError):
        layers_with_cross_attention(6, 0)
    assert len(tiny_flamingo(xattn_every=2).lang_encoder._get_decoder_layers()) == 1


def test_decoder_layers_are_found_by_table_structure_or_name():
    lm = tiny_lm()
    assert find_decoder_layers(lm)[0] == "model.decoder.layers"
    lm.config.model_type = "never-heard-of"
    assert find_decoder_layers(lm)[0] == "model.decoder.layers"
    lm.other = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    with pytest.raises(ValueError, match="decoder_layers_attr_name"):
        find_decoder_layers(lm)
    assert find_decoder_layers(lm, "model.decoder.layers")[0] == "model.decoder.layers"


def test_added_tokens_must_be_consecutive():
    with pytest.raises(ValueError, match=r"consecutive, not \[2, 51\]"):
        decouple_added_tokens(tiny_lm(), [2, 51])


def test_added_tokens_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="another language model"):
        tiny_flamingo(vocab_size=40)
