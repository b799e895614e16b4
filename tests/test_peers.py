"""Other Flamingos agree with ours to 1e-5 on the same random weights, and their checkpoints load.

The parity tests need the packages of requirements-peers.txt; the tests of flamingo-mini write its checkpoint
themselves, from the names it documents. Left out are the rows where the peers are wrong: text before the first
picture when all pictures are seen (their softmax then falls on every picture, later ones included), and more <image>
tokens than pictures.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import EOC, IMAGE, TinyEncoder, tiny_flamingo, tiny_lm
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from flamingo.errors import InputError
from flamingo.files import asset
from flamingo.interop.backbones import build_flamingo
from flamingo.interop.peers import (
    FLAMINGO_MINI_CONFIG,
    config_from_flamingo_mini,
    import_weights,
    open_flamingo_settings,
    rename_flamingo_pytorch,
)
from flamingo.model.cross_attention import GatedCrossAttentionBlock, media_attention_mask
from flamingo.model.resampler import PerceiverResampler

try:
    import flamingo_pytorch
    from open_flamingo.src import flamingo as open_flamingo
    from open_flamingo.src import flamingo_lm as open_flamingo_lm
    from open_flamingo.src import helpers as open_flamingo_helpers
    from open_flamingo.src.utils import extend_instance as open_flamingo_extend
except ImportError:
    open_flamingo = None

needs_peers = pytest.mark.skipif(
    open_flamingo is None,
    reason="pip install --no-deps open-flamingo==2.0.1 flamingo-pytorch==0.1.2 einops-exts==0.0.4",
)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ flamingo-mini
def mini_checkpoint(*, dim=32, d=12, table=52, layers=2, every=1, inner=16, cross=32, prefix="flamingo.lm.decoder"):
    """Random trained tensors of a flamingo-mini under the names it documents, and a few frozen ones."""
    torch.manual_seed(1)
    shapes = {
        "flamingo.resampler.latents": (3, d),
        "flamingo.resampler.time_pos_emb": (2, 1, d),
        "flamingo.resampler.norm.weight": (d,),
        "flamingo.resampler.norm.bias": (d,),
        "flamingo.vision_encoder.vision_model.embeddings.class_embedding": (d,),
        f"{prefix}.embed_tokens.weight": (table, dim),
        "flamingo.lm_head.weight": (table, dim),
    }
    for i in range(2):
        layer = f"flamingo.resampler.layers.{i}"
        shapes |= {f"{layer}.0.{norm}.{what}": (d,) for norm in ("norm_media", "norm_latents") for what in WEIGHT_BIAS}
        shapes |= {f"{layer}.0.{to}.weight": (inner, d) for to in ("to_q", "to_k", "to_v")}
        shapes |= {f"{layer}.0.to_out.weight": (d, inner)} | feed_forward_shapes(f"{layer}.1", d)
    for i in range(layers):
        block = f"{prefix}.layers.{i}.xattn_block"
        if i % every == 0:
            shapes |= {
                f"{block}.alpha_attn": (1,),
                f"{block}.alpha_ffw": (1,),
                f"{block}.attn.norm.weight": (dim,),
                f"{block}.attn.norm.bias": (dim,),
                f"{block}.attn.to_q.weight": (cross, dim),
                f"{block}.attn.to_kv.weight": (2 * cross, d),
                f"{block}.attn.to_out.weight": (dim, cross),
            }
            shapes |= feed_forward_shapes(f"{block}.ffw", dim)
        layer = f"{prefix}.layers.{i}.lm_block" if i % every == 0 else f"{prefix}.layers.{i}"
        shapes[f"{layer}.fc1.weight"] = (64, dim)
    return {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}  # fmt: skip


WEIGHT_BIAS = ("weight", "bias")


def feed_forward_shapes(name, dim):
    return {f"{name}.0.weight": (dim,), f"{name}.0.bias": (dim,), f"{name}.1.weight": (4 * dim, dim),
            f"{name}.3.weight": (dim, 4 * dim)}  # fmt: skip


def mini_resampler(tensors, x, heads):
    """flamingo-mini's resampler written out: x (N, F, v, d) → (N, n, d), keys and values of two matrices."""

    def get(name):
        return tensors[f"flamingo.resampler.{name}"]

    def norm(t, name):
        return F.layer_norm(t, t.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"))

    x = (x + get("time_pos_emb")[: x.shape[1]]).flatten(1, 2)
    latents = get("latents").expand(len(x), -1, -1)
    for i in range(2):
        media, asking = norm(x, f"layers.{i}.0.norm_media"), norm(latents, f"layers.{i}.0.norm_latents")
        both = torch.cat([media, asking], dim=1)
        q, k, v = (
            (t @ get(f"layers.{i}.0.{to}.weight").T).unflatten(-1, (heads, -1)).transpose(1, 2)
            for t, to in ((asking, "to_q"), (both, "to_k"), (both, "to_v"))
        )
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        latents = latents + attention.transpose(1, 2).flatten(2) @ get(f"layers.{i}.0.to_out.weight").T
        hidden = norm(latents, f"layers.{i}.1.0") @ get(f"layers.{i}.1.1.weight").T
        latents = latents + hidden.relu() ** 2 @ get(f"layers.{i}.1.3.weight").T
    return norm(latents, "norm")


def tiny_mini(**options):
    return tiny_flamingo(xattn_act="sqrelu", resampler_act="sqrelu", **options)


def save_mini(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_resampler_of_flamingo_mini_computes_here_what_it_computes_there(tmp_path):
    tensors = mini_checkpoint()
    model = tiny_mini()
    import_weights(model, save_mini(tmp_path, tensors))
    features = torch.randn(3, 2, 4, 12)  # two frames, each with an embedding of its own
    close(model.perceiver(features), mini_resampler(tensors, features, heads=2))
    swapped = {name.replace("to_k.", "to_K.").replace("to_v.", "to_k.").replace("to_K.", "to_v."): tensor
               for name, tensor in tensors.items()}  # fmt: skip
    assert not torch.allclose(model.perceiver(features), mini_resampler(swapped, features, heads=2), atol=1e-2)


@pytest.mark.parametrize("every", [1, 2])
def test_the_blocks_of_flamingo_mini_arrive_under_our_names(tmp_path, every):
    tensors, model = mini_checkpoint(every=every), tiny_mini(xattn_every=every)
    frozen = model.lang_encoder.get_input_embeddings().weight.clone()
    line = import_weights(model, save_mini(tmp_path, tensors))
    layers = model.lang_encoder.model.decoder.layers
    for i in range(0, 2, every):
        block, theirs = layers[i].gated_cross_attn_layer, f"flamingo.lm.decoder.layers.{i}.xattn_block"
        assert torch.equal(block.attn_gate, tensors[f"{theirs}.alpha_attn"])
        assert torch.equal(block.ff_gate, tensors[f"{theirs}.alpha_ffw"])
        assert torch.equal(block.attn.to_kv.weight, tensors[f"{theirs}.attn.to_kv.weight"])
        assert torch.equal(block.ff[3].weight, tensors[f"{theirs}.ffw.3.weight"])
    assert torch.equal(model.lang_encoder.get_input_embeddings().weight, frozen)
    ours = len(model.trainable_state_dict()) - 2
    assert f"{ours} tensors of flamingo-mini loaded, and the rows of 1 added token(s); 50 rows of other tokens" in line


def test_eoc_of_flamingo_mini_is_taken_by_id_and_image_is_not(tmp_path):
    tensors, model = mini_checkpoint(), tiny_mini()
    fresh = model.trainable_state_dict()["lang_encoder.model.decoder.embed_tokens.additional_embedding.weight"].clone()
    import_weights(model, save_mini(tmp_path, tensors))
    embedded = model.lang_encoder.get_input_embeddings()(torch.tensor([EOC, IMAGE]))
    assert torch.equal(embedded[0], tensors["flamingo.lm.decoder.embed_tokens.weight"][EOC])
    assert torch.equal(embedded[1], fresh[1])
    head = model.lang_encoder.get_output_embeddings()
    hidden = torch.randn(1, 32)
    close(head(hidden)[0, EOC], (hidden @ tensors["flamingo.lm_head.weight"][EOC])[0])


def test_the_time_embedding_of_flamingo_mini_counts_even_for_stills(tmp_path, texts, pictures):
    tensors = mini_checkpoint()
    logits = []
    for shift in (0.0, 1.0):
        tensors["flamingo.resampler.time_pos_emb"][0] += shift * torch.randn(12)
        model = tiny_mini()
        import_weights(model, save_mini(tmp_path, tensors))
        logits.append(model(texts, pixel_values=pictures).logits)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def mini_folder(tmp_path):
    """A flamingo-mini folder whose backbones are the classroom's language model and a tiny Hugging Face CLIP."""
    clip = tmp_path / "clip"
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    CLIPVisionModel(vision).save_pretrained(clip)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(clip)
    lm = asset("classroom") / "opt"
    shape = json.loads((lm / "config.json").read_text())
    values = {
        "lm": str(lm), "clip_model_type": str(clip), "dim": shape["hidden_size"], "dim_visual": 12,
        "freeze_language_model": True, "freeze_vision_model": True, "xattn_every": 2, "xattn_dim_head": 8,
        "xattn_heads": 4, "xattn_ff_mult": 4, "xattn_act": "sqrelu", "resampler_depth": 2, "resampler_dim_head": 8,
        "resampler_heads": 2, "resampler_num_latents": 3, "resampler_num_time_embeds": 2, "resampler_ff_mult": 4,
        "resampler_act": "sqrelu",
    }  # fmt: skip
    assert values.keys() == set(FLAMINGO_MINI_CONFIG)
    folder = save_mini(tmp_path / "mini", mini_checkpoint(
        dim=shape["hidden_size"], table=shape["vocab_size"] + 2, layers=shape["num_hidden_layers"], every=2,
    ))  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values | {"architectures": ["FlamingoModel"], "model_type": ""}))
    return folder


def test_a_flamingo_mini_folder_becomes_a_model_that_writes(tmp_path):
    folder = mini_folder(tmp_path)
    config = config_from_flamingo_mini(folder)
    assert (config.fusion.act, config.fusion.every, config.fusion.placement) == ("sqrelu", 2, "near")
    assert (config.vision.feature_norm, config.vision.class_token) == (False, True)
    model, processor, _ = build_flamingo(config)
    import_weights(model, folder)
    pixels = torch.randn(1, 1, 1, 3, 32, 32)
    features = model.encode_images(pixels[0])
    assert features.shape == (1, 1, 5, 12)  # four patches, and the class token before them
    expected = CLIPVisionModel.from_pretrained(config.vision.name)(pixels[0, 0]).last_hidden_state
    close(features[0], expected)
    ids = torch.tensor([[*processor.begin_ids, processor.media_token_id]])
    assert model.generate(ids, torch.ones_like(ids), pixel_values=pixels, max_new_tokens=3).shape[1] > ids.shape[1]


def test_a_folder_of_something_else_is_no_flamingo_mini(tmp_path):
    with pytest.raises(InputError, match=r"no flamingo-mini folder: it has no config\.json"):
        config_from_flamingo_mini(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(InputError, match="no config of flamingo-mini"):
        config_from_flamingo_mini(tmp_path)


# -------------------------------------------------------------------------------- wrong files, in one sentence
def test_wrong_files_are_named(tmp_path):
    model = tiny_mini()
    before = {name: tensor.clone() for name, tensor in model.trainable_state_dict().items()}
    good = mini_checkpoint()

    def refused(content, match, name="checkpoint.pt"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(InputError, match=match) as error:
            import_weights(model, path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    def without(*ends):
        return {name: tensor for name, tensor in good.items() if not name.endswith(ends)}

    refused(b"", "damaged")
    refused(b"not a checkpoint", "more than tensors, or is no checkpoint")
    refused(b"not a checkpoint", "damaged", "checkpoint.safetensors")
    refused({"perceiver.latents": Evil()}, "such files are not opened")
    refused([1, 2], "not a table of tensors by name")
    refused({"weight": torch.zeros(2)}, "it has no resampler")
    refused(without("layers.1.0.to_v.weight"), r"1 tensors missing, 1 unknown.*such as perceiver\.layers\.1\.0\.to_kv")
    refused(without("alpha_attn"), "2 tensors missing, 0 unknown")
    refused(good | {"flamingo.resampler.extra": torch.zeros(2)}, r"1 unknown.*such as perceiver\.extra")
    refused(good | {"flamingo.projector.weight": torch.zeros(2)}, r"1 unknown.*such as projector\.weight")
    refused(good | {"flamingo.resampler.latents": torch.zeros(5, 12)}, r"1 of another shape \(such as perceiver\.lat")
    refused(mini_checkpoint(every=2), "tensors missing.*build the model with the settings")
    refused(good | {"flamingo.lm.decoder.embed_tokens.weight": torch.zeros(9, 32)}, "belongs to another language model")
    with pytest.raises(InputError, match="no such file or folder"):
        import_weights(model, tmp_path / "nothing")
    with pytest.raises(InputError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        (tmp_path / "empty").mkdir()
        import_weights(model, tmp_path / "empty")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.trainable_state_dict().items())


class Evil:
    """Something that pickles but is no tensor: loading it would run its code."""


# --------------------------------------------------------------------------- modules: the same numbers elsewhere
LOCATIONS = torch.tensor([[0, 0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]]).bool()


def same_weights(ours, theirs):
    """Random weights in the peer, gates open, carried over to ours by name."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours.load_state_dict(rename_flamingo_pytorch(theirs.state_dict()))  # strict: every name, nothing over
    return ours.eval(), theirs.eval()


@needs_peers
def test_the_resampler_of_flamingo_pytorch():
    shape = {"dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "num_latents": 5}
    theirs = flamingo_pytorch.PerceiverResampler(**shape, num_media_embeds=4)
    ours, theirs = same_weights(PerceiverResampler(**shape, max_num_media=4), theirs)
    x = torch.randn(2, 3, 7, 16)  # (B, T_img, v, d)
    places = torch.arange(3).repeat(2)
    close(ours(x.flatten(0, 1)[:, None], places).unflatten(0, (2, 3)), theirs(x))


@needs_peers
@pytest.mark.parametrize("frames, media", [(None, None), (3, None), (3, 4)])
def test_the_resampler_of_open_flamingo(frames, media):
    shape = {"dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "num_latents": 5}
    shape |= {"max_num_frames": frames, "max_num_media": media}
    ours, theirs = same_weights(PerceiverResampler(**shape), open_flamingo_helpers.PerceiverResampler(**shape))
    x = torch.randn(2, 3, 2, 7, 16)  # (B, T_img, F, v, d)
    if media:  # the peer adds its (T_img, 1, d) to (B, T_img, F v, d)
        close(ours(x.flatten(0, 1), torch.arange(3).repeat(2)).unflatten(0, (2, 3)), theirs(x))
    else:
        close(ours(x.flatten(0, 1)).unflatten(0, (2, 3)), theirs(x))


@needs_peers
@pytest.mark.parametrize("only_immediate", [True, False])
@pytest.mark.parametrize("peer", ["open_flamingo", "flamingo_pytorch"])
def test_the_gated_block(peer, only_immediate):
    shape = {"dim": 16, "dim_head": 8, "heads": 2}
    if peer == "open_flamingo":
        theirs = open_flamingo_helpers.GatedCrossAttentionBlock(
            **shape, dim_visual=12, only_attend_immediate_media=only_immediate
        )
    else:
        theirs = flamingo_pytorch.GatedCrossAttentionBlock(**shape, only_attend_immediate_media=only_immediate)
    dim_visual = theirs.attn.to_kv.in_features
    ours, theirs = same_weights(GatedCrossAttentionBlock(**shape, dim_visual=dim_visual), theirs)
    assert ours.attn_gate.abs() > 0.01 and ours.ff_gate.abs() > 0.01
    x, media = torch.randn(3, 7, 16), torch.randn(3, 2, 5, dim_visual)  # two pictures a text; the third shows one
    sight = media_attention_mask(LOCATIONS, torch.tensor([[0, 1], [2, 3], [4, 5]]), only_immediate)
    result = ours(x, ours.attn.project_media(media.flatten(0, 1)), sight)
    expected = theirs(x, media, media_locations=LOCATIONS)
    right = torch.ones_like(LOCATIONS) if only_immediate else LOCATIONS.cumsum(1) > 0
    close(result[right], expected[right])


# ------------------------------------------------------------------------------ the whole model, and its checkpoint
class AsClip(torch.nn.Module):
    """What OpenFlamingo takes for a CLIP: `visual` gives a pair, pooled and patch features."""

    class Visual(TinyEncoder):
        def forward(self, pixel_values):
            return None, super().forward(pixel_values)

    def __init__(self):
        super().__init__()
        self.visual = self.Visual()


def open_flamingo_model(every, vocab_size=50):
    """A tiny OpenFlamingo put together as its factory does it, random everywhere, its added tokens 50 and 51."""
    torch.manual_seed(7)
    lm = tiny_lm(vocab_size, layers=3)
    open_flamingo_extend(lm, open_flamingo_lm.FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("model.decoder.layers")
    lm.resize_token_embeddings(52)
    theirs = open_flamingo.Flamingo(
        AsClip(), lm, eoc_token_id=EOC, media_token_id=IMAGE, vis_dim=12, cross_attn_every_n_layers=every
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if name.endswith("_gate") else 0.05))
    return theirs.eval()


def ours_around(theirs, every, vocab_size=50):
    """Our Flamingo on the same two frozen backbones, its trained parts fresh."""
    settings = open_flamingo_settings(every)
    shape = {name: value for name, value in settings.items() if name.startswith(("xattn_", "resampler_"))}
    full = {"resampler_depth": 6, "resampler_dim_head": 64, "resampler_heads": 8, "resampler_num_latents": 64,
            "xattn_dim_head": 64, "xattn_heads": 8}  # fmt: skip
    frozen = tiny_lm(vocab_size, layers=3)
    spare = torch.zeros(vocab_size - 50, 32)
    state = {}
    for name, tensor in theirs.lang_encoder.state_dict().items():
        if "gated_cross_attn" not in name and "old_decoder_blocks" not in name:
            state[name.replace(".decoder_layer.", ".")] = (
                torch.cat([tensor[:50], spare]) if len(tensor) == 52 else tensor
            )
    frozen.load_state_dict(state)
    model = tiny_flamingo(open_gates=False, lm=frozen, **(full | shape))
    model.vision_encoder.load_state_dict(theirs.vision_encoder.state_dict())
    return model


SPELLINGS = {
    "released": ("old_decoder_blocks", "gated_cross_attn_layers.", "vision_encoder", "decoder_layer."),
    "second names": ("old_decoder_blocks", ".gated_cross_attn_layer.", "vision_encoder", "decoder_layer."),
    "everything": (),
}


@needs_peers
@pytest.mark.parametrize("form", ["flat.pt", "training.pt", "flat.safetensors"])
@pytest.mark.parametrize("spelling, every", [("released", 1), ("released", 2), ("second names", 2), ("everything", 1)])
def test_an_open_flamingo_checkpoint_gives_its_logits_here(tmp_path, form, spelling, every, texts, pictures):
    theirs = open_flamingo_model(every)
    mask = torch.ones_like(texts)
    expected = theirs(pictures, texts, attention_mask=mask).logits
    state = {name: tensor for name, tensor in theirs.state_dict().items()
             if not any(part in name for part in SPELLINGS[spelling])}  # fmt: skip
    path = tmp_path / form
    if form == "training.pt":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}, path)
    elif form == "flat.pt":
        torch.save(state, path)
    else:
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    ours = ours_around(theirs, every)
    assert not torch.allclose(ours(texts, mask, pixel_values=pictures).logits[..., :50], expected[..., :50], atol=1e-2)
    line = import_weights(ours, path)
    assert line.endswith("and the rows of 2 added token(s)")
    close(ours(texts, mask, pixel_values=pictures).logits, expected)


@needs_peers
def test_padding_and_a_table_with_spare_rows(tmp_path, texts, pictures):
    """As with OPT: the peer cuts its table of 60 rows down to 52, ours keeps it and the added tokens lie inside."""
    theirs = open_flamingo_model(1, vocab_size=60)
    torch.save(theirs.state_dict(), tmp_path / "checkpoint.pt")
    ours = ours_around(theirs, 1, vocab_size=60)
    import_weights(ours, tmp_path / "checkpoint.pt")
    mask = torch.ones_like(texts)
    mask[0, 6:] = 0
    texts = texts.masked_fill(mask == 0, 1)
    result, expected = ours(texts, mask, pixel_values=pictures).logits, theirs(pictures, texts, mask).logits
    assert result.shape[-1] == 60
    close(result[mask == 1][:, :52], expected[mask == 1])


@needs_peers
def test_an_open_flamingo_checkpoint_without_a_vocabulary_keeps_our_rows(tmp_path):
    theirs = open_flamingo_model(1)
    parts = ("perceiver.", "gated_cross_attn_layer.")
    state = {name: tensor for name, tensor in theirs.state_dict().items() if any(part in name for part in parts)}
    torch.save(state, tmp_path / "checkpoint.pt")
    ours = ours_around(theirs, 1)
    name = "lang_encoder.model.decoder.embed_tokens.additional_embedding.weight"
    before = ours.trainable_state_dict()[name].clone()
    assert "no rows of added tokens" in import_weights(ours, tmp_path / "checkpoint.pt")
    assert torch.equal(ours.trainable_state_dict()[name], before)
    with pytest.raises(InputError, match=r"tensors missing.*settings of flamingo/interop/peers\.py"):
        import_weights(tiny_flamingo(), tmp_path / "checkpoint.pt")
