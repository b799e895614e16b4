"""Attention put back on the picture: recomputed weights are the layers' own, and watching changes nothing."""

import pytest
import torch
from conftest import EOC, IMAGE, tiny_flamingo
from torch import nn

from flamingo.classroom import scenes
from flamingo.evaluation import attention
from flamingo.model.cross_attention import MaskedCrossAttention, media_attention_mask
from flamingo.model.resampler import PerceiverAttention


def test_recomputed_cross_attention_is_the_layers_own():
    """The weights, applied to the values, must give what the layer gives: one picture, several, none yet."""
    torch.manual_seed(0)
    attn = MaskedCrossAttention(dim=16, dim_visual=12, dim_head=4, heads=3)
    x, media = torch.randn(2, 5, 16), torch.randn(3, 6, 12)
    locations = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    sight = media_attention_mask(locations, torch.tensor([[0, 2], [1, -1]]))
    keys_values = attn.project_media(media)
    weights = attention.cross_attention_weights(attn, x, keys_values, sight)  # (B, h, T_txt, T_img·n)
    values = keys_values[1][sight.image_index].permute(0, 2, 1, 3, 4).flatten(2, 3)  # (B, h, T_img·n, c)
    out = attn.to_out((weights @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(out, attn(x, keys_values, sight), atol=1e-5)
    assert weights[0, :, 0].abs().max() == 0 and torch.allclose(weights[1].sum(-1), torch.ones(3, 5))
    assert weights[0, :, 2, 6:].abs().max() == 0 and weights[0, :, 4, :6].abs().max() == 0  # its own picture only


def test_recomputed_resampler_attention_is_the_layers_own():
    torch.manual_seed(0)
    attn = PerceiverAttention(dim=12, dim_head=4, heads=2)
    x, latents = torch.randn(2, 7, 12), torch.randn(2, 3, 12)
    weights = attention.resampler_weights(attn, x, latents)  # (N, h, n, k + n)
    both = torch.cat([attn.norm_media(x), attn.norm_latents(latents)], dim=1)
    values = attn.to_kv(both).chunk(2, dim=-1)[1].unflatten(2, (2, 4)).transpose(1, 2)
    assert torch.allclose(attn.to_out((weights @ values).transpose(1, 2).flatten(2)), attn(x, latents), atol=1e-5)


def test_a_latent_that_looks_at_one_patch_is_traced_to_it():
    """Rollout by hand: layer 1 looks at patch 2; layer 2 at the other latent, which looked at patch 0."""
    one = torch.tensor([[[0.0, 0, 1, 0, 0], [1.0, 0, 0, 0, 0]]])  # 2 latents over 3 patches and 2 latents
    assert attention.latents_to_patches([one], 3).tolist() == [[[0, 0, 1], [1, 0, 0]]]
    two = torch.tensor([[[0.0, 0, 0, 0, 1], [0.0, 1, 0, 0, 0]]])
    held = attention.latents_to_patches([one, two], 3)
    assert torch.allclose(held, torch.tensor([[[0.5, 0, 0.5], [1 / 3, 2 / 3, 0]]]))


def test_watching_changes_nothing_and_leaves_no_hook():
    model = tiny_flamingo()
    ids, pixels = torch.tensor([[2, IMAGE, 7, 8, EOC]]), torch.randn(1, 1, 1, 3, 8, 8)
    mask = torch.ones_like(ids)
    before = model(ids, mask, pixel_values=pixels).logits
    looks = attention.text_to_patches(model, ids, mask, pixels)  # (1, 5, 4)
    assert torch.equal(model(ids, mask, pixel_values=pixels).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.allclose(looks.sum(-1), torch.tensor([[0.0, 1, 1, 1, 1]]), atol=1e-5)  # nothing before the picture


def test_closed_layers_have_no_say():
    model = tiny_flamingo()
    blocks = [layer.gated_cross_attn_layer for layer in model.lang_encoder._get_decoder_layers()]
    nn.init.zeros_(blocks[1].attn_gate)
    ids, pixels = torch.tensor([[2, IMAGE, 7]]), torch.randn(1, 1, 1, 3, 8, 8)
    with attention.recorded_attention(model) as recorded:
        model(ids, pixel_values=pixels)
    held = attention.latents_to_patches(recorded.resampler, 4)
    looks = attention.text_to_patches(model, ids, torch.ones_like(ids), pixels)
    first, second = (weights.mean(dim=1) for weights in recorded.text_to_latents)  # over heads
    assert torch.allclose(looks, first @ held, atol=1e-6)
    assert not torch.allclose(first, second, atol=1e-3)


def test_one_layer_or_one_head_can_be_shown_alone_whatever_its_gate():
    model = tiny_flamingo()
    nn.init.zeros_(model.cross_attention_blocks()[1].attn_gate)
    ids, pixels = torch.tensor([[2, IMAGE, 7]]), torch.randn(1, 1, 1, 3, 8, 8)
    with attention.recorded_attention(model) as recorded:
        model(ids, pixel_values=pixels)
    held = attention.latents_to_patches(recorded.resampler, 4)
    for view, weights in {
        attention.View(layer=1): recorded.text_to_latents[1].mean(dim=1),
        attention.View(layer=1, head=2): recorded.text_to_latents[1][:, 2],
        attention.View(head=3): recorded.text_to_latents[0][:, 3],  # the only layer whose gate is open
    }.items():
        looks = attention.text_to_patches(model, ids, torch.ones_like(ids), pixels, view=view)
        assert torch.allclose(looks, weights @ held, atol=1e-6), view


def test_hits_are_counted_where_the_named_thing_stands():
    placed = (scenes.Placed("dog", (0, 0, 30, 30)), scenes.Placed("cat", (64, 64, 96, 96)))
    scene = scenes.Scene("row", placed, "white", (250, 250, 250))
    top_left, bottom_right = torch.zeros(6, 6), torch.zeros(6, 6)
    top_left[0, 1], bottom_right[5, 5] = 1.0, 1.0
    looks = [
        attention.WordLook(0, "dog", top_left), attention.WordLook(0, "cat", top_left),
        attention.WordLook(0, "cats", bottom_right), attention.WordLook(0, "bee", top_left),
    ]  # fmt: skip
    found = attention.hit_rate(looks, [scene])
    assert found["n"] == 3 and found["attention_hit_rate"] == pytest.approx(2 / 3)
    assert found["chance"] == pytest.approx(4 / 36)  # 2 x 2 of 6 x 6 patches have their middle in either box
    assert attention.hit_rate(looks[3:], [scene])["attention_hit_rate"] is None
