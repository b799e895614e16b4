"""Every vision tokenizer with every fusion: the same promises, kept by all."""

import pytest
import torch
import torch.nn.functional as F
from conftest import EOC, IMAGE, PAD, TinyEncoder, assemble, open_the_gates, tiny_lm

from flamingo.config import TrainingOptions
from flamingo.errors import InputError
from flamingo.fast.enable import enable
from flamingo.fast.inference import prepare_to_generate
from flamingo.fast.precision import autocast
from flamingo.interop.selfcheck import check_decoding
from flamingo.model.build import VLM, VLMWithCrossAttention, VLMWithLanguageStream, build_from_parts
from flamingo.model.cross_attention import Images
from flamingo.model.language_stream import lay_stream
from flamingo.model.linear import LinearProjection
from flamingo.model.qformer import QFormer
from flamingo.model.vlm import SpecialTokens
from flamingo.presets import ARCHITECTURES, PRESETS, model_config
from flamingo.settings import from_flat, to_flat
from flamingo.training.command_line import parse_training_options
from flamingo.training.optimizer import make_optimizer

TOKENIZERS = {
    "perceiver": {"resampler_depth": 2, "resampler_dim_head": 8, "resampler_heads": 2, "resampler_num_latents": 3},
    "qformer": {"qformer_depth": 2, "qformer_width": 16, "qformer_heads": 2, "qformer_num_latents": 3},
    "linear": {"linear_num_patches": 4},
}
FUSIONS = {"cross-attention": {"xattn_dim_head": 8, "xattn_heads": 4}, "language-stream": {}}
COMBINATIONS = [(tokenizer, fusion) for tokenizer in TOKENIZERS for fusion in FUSIONS]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def tiny_vlm(tokenizer: str, fusion: str, *, lm=None, fast: bool = False, open_gates: bool = True, **flat):
    torch.manual_seed(0)
    settings = {"tokenizer_type": tokenizer, "fusion_type": fusion} | TOKENIZERS[tokenizer] | FUSIONS[fusion] | flat
    model = assemble(TinyEncoder(), lm or tiny_lm(), **settings)
    if open_gates:
        open_the_gates(model)
    if fast:
        assert "chunked" in enable(model)
    return model.eval()


@pytest.fixture(params=COMBINATIONS, ids="+".join)
def model(request):
    return tiny_vlm(*request.param)


@pytest.fixture(params=TOKENIZERS)
def stream_model(request):
    return tiny_vlm(request.param, "language-stream")


# ----------------------------------------------------------------------------------------- what stands where
def stream_of(ids, index, n=2, mask=None, left=False, in_place=False):
    """One text whose token t has the embedding (t, 0), and latent k of picture i the embedding (100 i + k, 1)."""
    ids = torch.tensor([ids])
    embeds = torch.stack([ids.float(), torch.zeros_like(ids).float()], dim=-1)
    bank = torch.tensor([[[100.0 * i + k, 1.0] for k in range(n)] for i in range(3)])
    mask = torch.ones_like(ids) if mask is None else torch.tensor([mask])
    images = Images(bank, torch.tensor([index]))
    stream = lay_stream(embeds, ids == IMAGE, mask, images, room_on_the_left=left, in_place=in_place)
    shown = [int(a) if b == 0 else f"{int(a) // 100}.{int(a) % 100}" for a, b in stream.embeds[0].tolist()]
    return shown, stream.attention_mask[0].tolist(), stream.position_ids[0].tolist(), stream.places[0].tolist()


def test_latents_stand_right_behind_their_image():
    shown, mask, positions, places = stream_of([2, IMAGE, 5, IMAGE, 6], [1, 0])
    assert shown == [2, IMAGE, "1.0", "1.1", 5, IMAGE, "0.0", "0.1", 6]
    assert mask == [1] * 9 and positions == list(range(9))
    assert places == [0, 3, 4, 7, 8]  # what follows a picture is predicted from its last latent


def test_latents_in_the_place_of_their_image():
    shown, mask, positions, places = stream_of([2, IMAGE, 5, IMAGE], [1, 0], in_place=True)
    assert shown == [2, "1.0", "1.1", 5, "0.0", "0.1"] and mask == [1] * 6 and positions == list(range(6))
    assert places == [0, 2, 3, 5]
    shown, mask, _, places = stream_of([2, IMAGE, 5], [2, -1], left=True, in_place=True)
    assert shown == [0, 2, "2.0", "2.1", 5] and mask == [0, 1, 1, 1, 1] and places == [1, 3, 4]


def test_a_text_with_fewer_pictures_leaves_its_room_empty_on_either_side():
    shown, mask, positions, places = stream_of([2, IMAGE, 5], [2, -1])
    assert shown == [2, IMAGE, "2.0", "2.1", 5, 0, 0] and mask == [1, 1, 1, 1, 1, 0, 0]
    assert positions[:5] == [0, 1, 2, 3, 4] and places == [0, 3, 4]
    shown, mask, positions, places = stream_of([2, IMAGE, 5], [2, -1], left=True)
    assert shown == [0, 0, 2, IMAGE, "2.0", "2.1", 5] and mask == [0, 0, 1, 1, 1, 1, 1]
    assert positions[2:] == [0, 1, 2, 3, 4] and places == [2, 5, 6]


def test_padding_stays_on_its_side_and_takes_no_position():
    shown, mask, positions, _ = stream_of([PAD, 2, IMAGE], [0], mask=[0, 1, 1], left=True)
    assert shown == [PAD, 2, IMAGE, "0.0", "0.1"] and mask == [0, 1, 1, 1, 1] and positions == [0, 0, 1, 2, 3]
    shown, mask, positions, places = stream_of([IMAGE, 5, PAD], [0], mask=[1, 1, 0])
    assert shown == [IMAGE, "0.0", "0.1", 5, PAD] and mask == [1, 1, 1, 1, 0] and places == [2, 3, 4]


def test_a_text_without_pictures_and_a_picture_at_the_end():
    shown, mask, _, places = stream_of([2, 5], [-1])
    assert shown == [2, 5, 0, 0] and mask == [1, 1, 0, 0] and places == [0, 1]
    assert stream_of([2, IMAGE], [1])[0] == [2, IMAGE, "1.0", "1.1"]
    with pytest.raises(ValueError, match="text 0 has 2 <image> tokens but 1 pictures"):
        stream_of([IMAGE, IMAGE], [0, -1])


def test_the_loss_of_a_stream_is_that_of_its_text_tokens(stream_model, texts, pictures):
    """Against a stream put together by hand, its latents without a label."""
    model, labels = stream_model, texts.masked_fill(texts == IMAGE, -100)
    bank = model.tokenize_images(model.encode_images(pictures.flatten(0, 1)))
    table, losses = model.lang_encoder.get_input_embeddings(), []
    for b in range(2):
        read, wanted, seen = [], [], 0
        for token in texts[b]:
            read.append(table(token[None]))
            wanted.append(token if token != IMAGE else torch.tensor(-100))
            if token == IMAGE:
                read.append(bank[2 * b + seen])
                wanted += [torch.tensor(-100)] * bank.shape[1]
                seen += 1
        logits = model.lang_encoder(inputs_embeds=torch.cat(read)[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], torch.stack(wanted)[1:], reduction="sum"))
    out = model(texts, labels=labels, pixel_values=pictures)
    close(out.loss, sum(losses) / (labels[:, 1:] != -100).sum())
    assert out.logits.shape[:2] == texts.shape


# ------------------------------------------------------------------------------------------ promises of all six
def test_before_training_cross_attention_changes_nothing_and_a_stream_is_seen(texts, pictures):
    for tokenizer, fusion in COMBINATIONS:
        model = tiny_vlm(tokenizer, fusion, open_gates=False)
        same = torch.equal(model(texts, pixel_values=pictures).logits, model(texts, blind=True).logits)
        assert same == (fusion == "cross-attention"), (tokenizer, fusion)


def test_blind_is_the_language_model_itself(texts):
    model = tiny_vlm("perceiver", "language-stream")
    close(model(texts, blind=True).logits, model.lang_encoder(input_ids=texts).logits)


def test_the_names_of_open_flamingo(model, texts, pictures):
    assert isinstance(model, VLM) and isinstance(model, (VLMWithCrossAttention, VLMWithLanguageStream))
    expected = model(texts, pixel_values=pictures).logits
    assert torch.equal(model(vision_x=pictures, lang_x=texts).logits, expected)
    with pytest.raises(ValueError, match="lang_x and input_ids are two names of the same thing"):
        model(vision_x=pictures, lang_x=texts, input_ids=texts)
    said = model.generate(vision_x=pictures, lang_x=texts, max_new_tokens=2)
    assert torch.equal(said, model.generate(texts, pixel_values=pictures, max_new_tokens=2))


def test_bank_equals_separate_pictures_and_batched_equals_one_by_one(model, texts, pictures):
    together = model(texts, pixel_values=pictures).logits
    index = torch.arange(4).view(2, 2)
    features = model.encode_images(pictures.flatten(0, 1))
    close(model(texts, features=features, image_index=index).logits, together)
    close(model(texts, latents=model.tokenize_images(features), image_index=index).logits, together)
    for k in range(2):
        close(model(texts[k : k + 1], pixel_values=pictures[k : k + 1]).logits[0], together[k])


def test_a_later_picture_never_changes_what_was_before(model, texts, pictures):
    other = pictures.clone()
    other[:, 1] += 1
    a, b = model(texts, pixel_values=pictures).logits, model(texts, pixel_values=other).logits
    close(a[0, :6], b[0, :6])
    assert not torch.allclose(a[0, 6:], b[0, 6:])


def test_decode_equals_full_forward(model, texts, pictures):
    prompt, ids = texts[:, :8], texts[:, :8]
    for _ in range(5):
        logits = model(ids, pixel_values=pictures).logits[:, -1].clone()
        logits[:, [IMAGE, PAD]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    options = {"max_new_tokens": 5, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, pixel_values=pictures, **options), ids)
    assert check_decoding(model) < 1e-4


def test_left_padding_and_uneven_pictures_change_nothing(model, pictures):
    short, long = [2, IMAGE, 11], [2, 7, IMAGE, 12, EOC, IMAGE, 13]
    padded = torch.tensor([[PAD] * 4 + short, long])
    mask, index = (padded != PAD).long(), torch.tensor([[0, -1], [1, 2]])
    options = {"max_new_tokens": 4, "eos_token_id": None}
    bank = pictures.flatten(0, 1)
    both = model.generate(padded, mask, pixel_values=bank, image_index=index, **options)
    scores = model.score_sequences(padded, [[20, EOC], [21, 22, EOC]], mask, pixel_values=bank, image_index=index)
    for k, (row, rows) in enumerate(((short, [0]), (long, [1, 2]))):
        alone = {"pixel_values": bank[rows][None]}
        assert both[k, 7:].tolist() == model.generate(torch.tensor([row]), **alone, **options)[0, len(row) :].tolist()
        close(scores[k], model.score_sequences(torch.tensor([row]), [[20, EOC], [21, 22, EOC]], **alone)[0])


def test_scores_are_those_of_the_whole_text(model, pictures):
    prompt, candidate = [2, IMAGE, 11], [21, 22, EOC]
    score = model.score_sequences(torch.tensor([prompt]), [candidate], pixel_values=pictures[:1, :1])
    logits = model(torch.tensor([prompt + candidate]), pixel_values=pictures[:1, :1]).logits[0].log_softmax(-1)
    close(score[0, 0], sum(logits[2 + k, token] for k, token in enumerate(candidate)))


def test_beams_encode_a_picture_once_and_one_beam_is_greedy(model, pictures):
    prompt, options = torch.tensor([[2, IMAGE, 11]]), {"max_new_tokens": 4, "eos_token_id": None}
    shown = {"pixel_values": pictures[:1, :1]}
    model.vision_encoder.calls = 0
    beams = model.generate(prompt, num_beams=3, num_return_sequences=3, **shown, **options)
    assert model.vision_encoder.calls == 1 and beams.shape == (3, 7)
    assert torch.equal(
        model.generate(prompt, num_beams=1, **shown, **options), model.generate(prompt, **shown, **options)
    )


def test_a_picture_enters_the_cache_once(stream_model, pictures):
    lengths, lm = [], stream_model.lang_encoder
    hook = lm.model.decoder.layers[0].register_forward_pre_hook(lambda m, args, kw: lengths.append(
        (args[0] if args else kw["hidden_states"]).shape[1]), with_kwargs=True)  # fmt: skip
    stream_model.generate(
        torch.tensor([[2, IMAGE, 11]]), pixel_values=pictures[:1, :1], max_new_tokens=3, eos_token_id=None
    )
    hook.remove()
    assert lengths == [3 + stream_model.tokens_per_image, 1, 1]


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "training"])
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_what_trains_moves_and_nothing_else(names, trains, texts, pictures):
    model = tiny_vlm(*names, freeze_language_model=not trains)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model.train(), TrainingOptions(lm_lr=7e-4, weight_decay=0.5))
    assert model.lang_encoder.training == trains and not model.vision_encoder.training
    for _ in range(2):
        model(texts, labels=texts.masked_fill(texts == IMAGE, -100), pixel_values=pictures).loss.backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trained = set(model.trainable_state_dict())
    assert moved <= trained | {"lang_encoder.lm_head.weight"}  # tied: the token embeddings under a second name
    assert ("lang_encoder.model.decoder.embed_tokens.weight" in moved) == trains
    assert any(name.startswith("perceiver.") for name in moved) and any(
        "additional_embedding" in name for name in moved
    )
    assert not any(name.startswith("vision_encoder.") for name in trained)
    of_lm = [group for group in optimizer.param_groups if group["lr"] == 7e-4]
    in_lm = sum(p.numel() for group in of_lm for p in group["params"])
    added = sum(p.numel() for part in model.added_parts() for p in part.parameters())
    assert in_lm == (sum(p.numel() for p in model.lang_encoder.parameters()) - added if trains else 0)


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_fast_has_the_same_loss_and_gradients(names, texts, pictures):
    plain, quick = tiny_vlm(*names), tiny_vlm(*names, fast=True)
    mask = torch.ones_like(texts)
    mask[1, 7:] = 0
    labels = texts.masked_fill((texts == IMAGE) | (mask == 0), -100)
    from flamingo.fast.packing import TextLayout

    a = plain(texts, mask, labels, pixel_values=pictures).loss
    b = quick(texts, mask, labels, pixel_values=pictures, layout=TextLayout.of(labels, mask)).loss
    close(b, a)
    close(quick(texts, mask, labels, pixel_values=pictures).loss, a)
    a.backward(), b.backward()
    for (name, p), q in zip(plain.named_parameters(), quick.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prepared_to_generate_it_says_the_same(model, texts, pictures, dtype):
    options = {"pixel_values": pictures, "max_new_tokens": 4, "eos_token_id": None}
    expected = model.generate(texts, **options)
    prepare_to_generate(model, dtype)
    with autocast(torch.device("cpu"), dtype):
        said = model.generate(texts, **options)
        assert check_decoding(model) < 0.05
    if dtype == "float32":
        assert torch.equal(said, expected)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "training"])
def test_gradient_checkpointing_of_a_stream(texts, pictures, trains):
    from flamingo.fast.checkpointing import checkpoint_layers

    labels = texts.masked_fill(texts == IMAGE, -100)
    lm = tiny_lm()
    lm.model.decoder.dropout = 0.0
    for layer in lm.model.decoder.layers:
        layer.dropout = 0.0
    model = tiny_vlm("linear", "language-stream", lm=lm, freeze_language_model=not trains).train()
    gradients = []
    for again in (False, True):
        if again:
            checkpoint_layers(model)
        model.zero_grad()
        model(texts, labels=labels, pixel_values=pictures).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


# -------------------------------------------------------------------------------------------------- tokenizers
def test_pixel_shuffle_lays_squares_of_patches_side_by_side():
    linear = LinearProjection(dim=1, shuffle=2, num_patches=16)
    seen = []
    linear.projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    linear(torch.arange(16.0).view(1, 1, 16, 1))
    assert seen[0][0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert linear.num_latents == 4
    with pytest.raises(ValueError, match="a picture of 15 patches, but "):
        linear(torch.zeros(1, 1, 15, 1))


def test_the_q_former_looks_in_every_second_layer_and_tells_frames_apart():
    former = QFormer(
        dim=12, depth=3, dim_out=5, width=16, heads=2, num_latents=4, max_num_frames=2, **{"ff_mult": 1}
    ).eval()
    layers = former.qformer.encoder.layer
    assert [layer.has_cross_attention for layer in layers] == [True, False, True]
    video = torch.randn(2, 2, 6, 12)
    assert former(video).shape == (2, 4, 5)
    assert not torch.allclose(former(video), former(video.flip(1)))
    with pytest.raises(ValueError, match="3 frames"):
        former(torch.randn(1, 3, 6, 12))


def test_a_query_gain_gives_each_query_of_a_fresh_q_former_a_look_of_its_own():
    torch.manual_seed(0)
    settings = {"dim": 192, "depth": 2, "width": 192, "heads": 6, "num_latents": 16, "ff_mult": 1}
    patches = torch.randn(8, 1, 36, 192)  # (N, F, v, d)
    looked_at = {}
    for gain in (1.0, 18.0):
        former = QFormer(**settings, query_gain=gain).eval()
        former.qformer.set_attn_implementation("eager")
        looks = []
        look = former.qformer.encoder.layer[0].crossattention.attention
        look.register_forward_hook(lambda module, inputs, out, looks=looks: looks.append(out[1]))
        former(patches)
        entropy = -(looks[0] * looks[0].log()).sum(-1)  # (N, h, n)
        looked_at[gain] = entropy.exp().mean().item()  # patches a query looks at, of 36
    assert looked_at[1.0] > 35.5 and looked_at[18.0] < 32


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_videos(tokenizer):
    model = tiny_vlm(tokenizer, "language-stream")
    video = torch.randn(1, 1, 3, 3, 8, 8)
    out = model.generate(torch.tensor([[2, IMAGE, 11]]), pixel_values=video, max_new_tokens=2, eos_token_id=None)
    assert out.shape == (1, 5)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_fresh_latents_are_as_large_as_token_embeddings(tokenizer):
    model = tiny_vlm(tokenizer, "language-stream")
    table = model.lang_encoder.get_input_embeddings().weight
    latents = model.tokenize_images(torch.randn(8, 1, 4, 12))
    assert 0.5 < latents.std() / table.std() < 2


# --------------------------------------------------------------------------------------- names, presets, bad input
def test_presets_have_the_policy_of_open_flamingo():
    for preset in ("classroom", "opt-125m"):
        for name, settings in ARCHITECTURES.items():
            config = model_config(parse_training_options(["--preset", f"{preset}-{name}"]))
            assert config.fusion_type == "language-stream" and config.language.freeze == (name != "kosmos")
            assert config.tokenizer_type == settings.get("tokenizer_type", "perceiver")
            assert config.language.name == PRESETS[preset]["model"]["language.name"]


def test_config_json_has_the_parts_that_are_built_and_no_others():
    flat = to_flat(from_flat({"tokenizer_type": "qformer", "fusion_type": "language-stream", "qformer_depth": 3}))
    assert flat["qformer_depth"] == 3
    assert not any(name.startswith(("resampler_", "linear_", "xattn_")) for name in flat)
    assert from_flat(flat) == from_flat({**flat})


def test_mistakes_are_sentences(texts, pictures):
    tokens = SpecialTokens(IMAGE, EOC, PAD)
    for settings, message in [
        ({"tokenizer_type": "q-former"}, "unknown tokenizer_type 'q-former': choose one of perceiver, qformer, linear"),
        ({"fusion_type": "stream"}, "unknown fusion_type 'stream': choose one of cross-attention, language-stream"),
        ({"tokenizer_type": "linear"}, "set linear.num_patches"),
        ({"tokenizer_type": "linear", "linear_num_patches": 9, "linear_shuffle": 2}, "9 patches form no square"),
        ({"tokenizer_type": "qformer", "qformer_heads": 5}, "qformer.width 768 must be a multiple of qformer.heads 5"),
    ]:
        with pytest.raises(InputError, match=message):
            build_from_parts(from_flat(settings), TinyEncoder(), tiny_lm(), tokens, 12)
    with pytest.raises(InputError, match=r"--set fusion\.heads: this model has no such part"):
        parse_training_options(["--preset", "classroom-blip", "--set", "fusion.heads=4"])


def test_a_stream_that_is_too_long_says_what_a_picture_takes(pictures):
    model = tiny_vlm("perceiver", "language-stream", resampler_num_latents=70)
    ids = torch.tensor([[2, IMAGE, 7, IMAGE, 8]])
    with pytest.raises(ValueError, match="text 0 with its pictures takes 145 of 128 positions, 70 for each picture"):
        model(ids, pixel_values=pictures[:1])
    with pytest.raises(ValueError, match=r"need 133 positions, the language model has 128 \(a picture takes 70\)"):
        model.generate(ids[:, :3], pixel_values=pictures[:1, :1], max_new_tokens=60)


def test_pictures_of_other_texts_and_embeddings_without_places_are_refused(stream_model, texts, pictures):
    with pytest.raises(ValueError, match="4 texts, but pictures for 2"):
        stream_model(texts.repeat(2, 1), pixel_values=pictures)
    embeds = stream_model.lang_encoder.get_input_embeddings()(texts)
    with pytest.raises(ValueError, match="give media_locations"):
        stream_model(inputs_embeds=embeds, pixel_values=pictures)
    given = stream_model(inputs_embeds=embeds, media_locations=texts == IMAGE, pixel_values=pictures).logits
    close(given, stream_model(texts, pixel_values=pictures).logits)


@pytest.mark.parametrize("tokenizer, fusion", COMBINATIONS)
def test_features_are_standardized_by_those_of_training_pictures_and_this_is_saved_with_the_model(tokenizer, fusion):
    prefix = {"perceiver": "resampler_"}.get(tokenizer, f"{tokenizer}_")
    model, plain = tiny_vlm(tokenizer, fusion, **{f"{prefix}standardize": True}), tiny_vlm(tokenizer, fusion)
    standardized, plain = model.vision_tokenizer, plain.vision_tokenizer
    features = 5 + torch.arange(1, 13) * torch.randn(6, 1, 4, 12)  # each channel of its own size, far from 0
    assert standardized(features).equal(plain(features))  # before it is fitted it is the tokenizer that it was
    standardized.fit_features(features)
    flat = features.flatten(0, 2)
    torch.testing.assert_close(standardized.feature_shift, flat.mean(0))
    close(standardized(features), plain((features - flat.mean(0)) / (flat.std(0) + 0.05)))
    ends = [name.rpartition(".")[2] for name in model.trainable_state_dict()]
    assert {"feature_shift", "feature_scale"} <= set(ends)
