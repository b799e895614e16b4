"""Checkpoints of OpenFlamingo's modeling package: random weights under its names, and its formulas written out."""

import pytest
import torch
from conftest import EOC, IMAGE, tiny_lm
from safetensors.torch import save_file
from test_architectures import tiny_vlm

from flamingo import InputError, import_weights, open_flamingo_modeling_settings

FAMILIES = {
    "flamingo": ("perceiver", "cross-attention", {"xattn_placement": "far"}),
    "kosmos": ("perceiver", "language-stream", {"freeze_language_model": False, "stream_in_place": True}),
    "blip": ("qformer", "language-stream", {"stream_in_place": True}),
}


def peers_name(name: str) -> str:
    """Ours → theirs."""
    name = name.replace("lang_encoder.", "lang_model.", 1)
    if "projection" in name and ("qformer" in FAMILIES[peers_name.family]):
        name = name.replace("perceiver.projection", "vision_tokenizer.proj")
    return name.replace("perceiver.", "vision_tokenizer.", 1)


def checkpoint(family: str, path):
    """Random tensors of the shapes that the peer trains, in a file. Returns them by their names."""
    tokenizer, fusion, flat = FAMILIES[family]
    model = tiny_vlm(tokenizer, fusion, **flat)
    draw, tensors = torch.Generator().manual_seed(1), {}
    peers_name.family = family
    for name, value in model.trainable_state_dict().items():
        rows = 1 if ".additional_" in name and family != "flamingo" else value.shape[0]  # only <image> is added there
        tensors[peers_name(name)] = 0.3 * torch.randn(rows, *value.shape[1:], generator=draw)
    tensors["lang_model.lm_head.additional_fc.bias"] = torch.zeros(1)
    tensors["vision_encoder.patch.weight"] = torch.randn(3)  # a full state dict has the frozen ones too
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_arrives_under_our_name(family, tmp_path):
    theirs = checkpoint(family, tmp_path / "c.safetensors")
    tokenizer, fusion, flat = FAMILIES[family]
    model = tiny_vlm(tokenizer, fusion, **flat)
    line = import_weights(model, tmp_path / "c.safetensors")
    assert "tensors of OpenFlamingo loaded" in line and "left out" not in line
    for name, value in model.trainable_state_dict().items():
        rows = theirs[peers_name(name)]
        assert torch.equal(value[-len(rows) :] if ".additional_" in name else value, rows), name


def resampler_of(own: dict):
    from flamingo.model.resampler import PerceiverResampler

    weight, bias = own.pop("projection.weight"), own.pop("projection.bias")
    resampler = PerceiverResampler(dim=12, depth=2, dim_head=8, heads=2, num_latents=3)
    resampler.load_state_dict(own)
    return lambda features: resampler(features) @ weight.T + bias


def qformer_of(own: dict):
    """transformers' own, called as the peer calls it: one picture's patches, the same queries for each."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    weight, bias, queries = own.pop("proj.weight"), own.pop("proj.bias"), own.pop("query_tokens")
    qformer = Blip2QFormerModel(Blip2QFormerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, encoder_hidden_size=12,
        cross_attention_frequency=2,
    )).eval()  # fmt: skip
    qformer.load_state_dict({name.removeprefix("qformer."): value for name, value in own.items()})
    read = lambda x: qformer(query_embeds=queries, encoder_hidden_states=x).last_hidden_state  # noqa: E731
    return lambda features: torch.cat([read(x) for x in features]) @ weight.T + bias


@pytest.mark.parametrize("family, tokenizer", [("kosmos", resampler_of), ("blip", qformer_of)])
def test_a_stream_computes_what_the_peer_computes(family, tokenizer, tmp_path, texts, pictures):
    """Its formula: token embeddings with each <image> replaced by the projected latents, read by the language model."""
    theirs = checkpoint(family, tmp_path / "c.safetensors")
    model = tiny_vlm(FAMILIES[family][0], "language-stream", **FAMILIES[family][2])
    import_weights(model, tmp_path / "c.safetensors")
    lm = tiny_lm()
    frozen = model.lang_encoder.state_dict()  # of BLIP's language model the checkpoint has nothing
    weights = {name.removeprefix("lang_model."): t for name, t in theirs.items() if name.startswith("lang_model.model")}
    lm.load_state_dict({n: t for n, t in (frozen | weights).items() if "additional" not in n}, strict=False)
    own = {n.removeprefix("vision_tokenizer."): t for n, t in theirs.items() if n.startswith("vision_tokenizer.")}
    latents = tokenizer(own)(model.encode_images(pictures.flatten(0, 1)))  # (4, n, D)
    ours = model(texts, pixel_values=pictures).logits
    for b in range(2):
        read, seen = [], 0
        for token in texts[b].tolist():
            if token == IMAGE:
                read.append(latents[2 * b + seen])
                seen += 1
            elif token == EOC:  # the peer has no such token here: ours, untouched by the checkpoint
                read.append(model.lang_encoder.get_input_embeddings()(torch.tensor([EOC])))
            else:
                read.append(lm.model.decoder.embed_tokens(torch.tensor([token])))
        logits = lm(inputs_embeds=torch.cat(read)[None]).logits[0]
        torch.testing.assert_close(ours[b, -1, :50], logits[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours[b, 0, :50], logits[0], rtol=1e-4, atol=1e-4)


def test_settings_and_mistakes(tmp_path):
    assert open_flamingo_modeling_settings("blip")["tokenizer_type"] == "qformer"
    assert open_flamingo_modeling_settings("flamingo", 2)["xattn_every"] == 2
    with pytest.raises(InputError, match="choose one of flamingo, kosmos, blip"):
        open_flamingo_modeling_settings("palm")
    checkpoint("kosmos", tmp_path / "c.safetensors")
    with pytest.raises(InputError, match="belongs to another model"):
        import_weights(tiny_vlm("qformer", "language-stream"), tmp_path / "c.safetensors")
