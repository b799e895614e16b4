"""Weights of other Flamingos, loaded into ours.

What this file teaches: OpenFlamingo, flamingo-mini and flamingo-pytorch are the same model with other names for its
tensors. The tables below are the whole difference:

    ours                                        OpenFlamingo         flamingo-mini                flamingo-pytorch
    perceiver.…                                 the same             resampler.…                  …
    perceiver.layers.i.0.to_kv  keys, values    the same             to_k and to_v, two matrices  the same
    perceiver.frame_embs (F, d)                 -                    time_pos_emb (F, 1, d)       -
    perceiver.media_time_embs (T_img, 1, d)     -                    -                            media_pos_emb
    ….i.gated_cross_attn_layer.attn…, .ff…      the same             ….i.xattn_block.attn…, ffw…  attn…, ff…
    ….i.gated_cross_attn_layer.attn_gate        the same             alpha_attn, alpha_ffw        the same
    two added rows, in and out                  rows of the table    one row of the table         -

OpenFlamingo's later package of Flamingo, Kosmos and BLIP says `vision_tokenizer.` and `lang_model.`, has our names for
the added rows (Kosmos and BLIP have one, for <image>), and calls the projection behind a Q-Former `proj`.

Where cross-attention stands, and what the encoder hands over, are settings: `open_flamingo_settings`,
`config_from_flamingo_mini`. flamingo-pytorch has no checkpoints and no frozen language model, only modules:
`rename_flamingo_pytorch` makes their state dicts fit `PerceiverResampler` and `GatedCrossAttentionBlock`.
"""

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flamingo.config import ModelConfig
from flamingo.errors import InputError
from flamingo.files import read_json
from flamingo.model.vlm import VisionLanguageModel
from flamingo.settings import from_flat
from flamingo.training.checkpoint import load_trained

# A peer's name → ours; the first pattern that fits the whole name decides. LAYERS: the language model's decoder layers.
OPEN_FLAMINGO = [
    (r"(perceiver\..+)", r"\1"),
    (r"lang_encoder\..+\.(\d+)\.gated_cross_attn_layer\.(.+)", r"LAYERS.\1.gated_cross_attn_layer.\2"),
    # The same tensors under a second name, in version 1 and in full state dicts. The number is the layer's here too.
    (r"lang_encoder\.gated_cross_attn_layers\.(\d+)\.(.+)", r"LAYERS.\1.gated_cross_attn_layer.\2"),
]
FLAMINGO_MINI = [
    (r"resampler\.time_pos_emb", r"perceiver.frame_embs"),
    (r"resampler\.(.+)", r"perceiver.\1"),
    (r"lm\..+\.(\d+)\.xattn_block\.alpha_attn", r"LAYERS.\1.gated_cross_attn_layer.attn_gate"),
    (r"lm\..+\.(\d+)\.xattn_block\.alpha_ffw", r"LAYERS.\1.gated_cross_attn_layer.ff_gate"),
    (r"lm\..+\.(\d+)\.xattn_block\.ffw\.(.+)", r"LAYERS.\1.gated_cross_attn_layer.ff.\2"),
    (r"lm\..+\.(\d+)\.xattn_block\.(.+)", r"LAYERS.\1.gated_cross_attn_layer.\2"),
]
FLAMINGO_MINI_CONFIG = (
    "lm", "clip_model_type", "dim", "dim_visual", "freeze_language_model", "freeze_vision_model",
    "xattn_every", "xattn_dim_head", "xattn_heads", "xattn_ff_mult", "xattn_act",
    "resampler_depth", "resampler_dim_head", "resampler_heads", "resampler_num_latents", "resampler_num_time_embeds",
    "resampler_ff_mult", "resampler_act",
)  # fmt: skip
# The later package of OpenFlamingo → the names that the table above knows.
MODELING = [
    (r"^vision_tokenizer\.proj\.", "perceiver.projection."),
    (r"^vision_tokenizer\.", "perceiver."),
    (r"^lang_model\.", "lang_encoder."),
]
FROZEN = ("vision_encoder.", "lang_encoder.", "lm.", "lm_head.")  # what is not renamed and begins so stays out


def open_flamingo_settings(xattn_every: int = 1) -> dict:
    """The flat settings (flamingo/settings.py, `from_flat`) that an OpenFlamingo checkpoint needs, besides `lm`.

    xattn_every: cross_attn_every_n_layers of its model card. The rest is the same for all of them: the last layer of
    each group, ViT-L-14 of OpenAI read before its final norm, no embeddings of frames.
    """
    return {
        "clip_model_type": "ViT-L-14-quickgelu:openai",
        "xattn_every": xattn_every,
        "xattn_placement": "far",
        "resampler_num_time_embeds": 0,
        "vision_feature_norm": False,
    }


def open_flamingo_modeling_settings(family: str, xattn_every: int = 1) -> dict:
    """The flat settings that a checkpoint of OpenFlamingo's modeling package needs, besides `lm`.

    family: flamingo, kosmos or blip. xattn_every: as above, of flamingo. Raises InputError for another family.
    """
    if family == "flamingo":
        return open_flamingo_settings(xattn_every)
    if family not in ("kosmos", "blip"):
        raise InputError(f"unknown family {family!r}: choose one of flamingo, kosmos, blip")
    encoder = {name: open_flamingo_settings()[name] for name in ("clip_model_type", "vision_feature_norm")}
    own = {"freeze_language_model": False} if family == "kosmos" else {"tokenizer_type": "qformer"}
    return encoder | {"fusion_type": "language-stream", "stream_in_place": True} | own


def config_from_flamingo_mini(folder: str | Path) -> ModelConfig:
    """Our config for a flamingo-mini folder: its names are ours, what it does not name is set as it was trained.

    Raises InputError when the folder holds no flamingo-mini config.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is no flamingo-mini folder: it has no config.json")
    settings = read_json(path)
    fields = set(settings) if isinstance(settings, dict) else set()
    known, ours_only = {"lm", "clip_model_type", "resampler_depth"}, "xattn_placement"
    if not known <= fields or ours_only in fields:
        raise InputError(f"{path} is no config of flamingo-mini: its fields are others")
    as_trained = {"xattn_placement": "near", "vision_feature_norm": False, "vision_class_token": True}
    defaults = {"resampler_num_time_embeds": 4}  # its other defaults are ours
    return from_flat(defaults | {name: settings[name] for name in FLAMINGO_MINI_CONFIG if name in fields} | as_trained)


def rename_flamingo_pytorch(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a flamingo-pytorch resampler or gated block → names of ours.

    The resampler needs max_num_media=4 (its num_media_embeds), the block dim_visual=dim.
    """
    return {name.replace("media_pos_emb", "media_time_embs"): tensor for name, tensor in tensors.items()}


def import_weights(model: VisionLanguageModel, path: str | Path) -> str:
    """Load what an OpenFlamingo checkpoint or a flamingo-mini folder trained into a freshly built model.

    The rows of the two added tokens are taken by id from the checkpoint's table and head, if it has them; of
    flamingo-mini's only that of <EOC>: it spells <image> in ordinary tokens, so that ours begins untrained. It also
    trains its whole vocabulary while ours is frozen; the line returned counts the rows that differ.

    Args:
        model: built with `open_flamingo_settings`, `open_flamingo_modeling_settings` or `config_from_flamingo_mini`.
        path: a file (.pt, .pth, .bin: only tensors are unpickled; or .safetensors), released or saved in training,
            or a folder with model.safetensors or pytorch_model.bin.

    Returns:
        One line that says what was loaded.

    Raises:
        InputError: the file is missing or damaged, is no such checkpoint, or its trained tensors are not exactly
            those of the model. The model is unchanged then.
    """
    path = _weights_file(Path(path))
    tensors = _read_tensors(path)
    if any(name.startswith("resampler.") for name in tensors):
        peer, table, added = "flamingo-mini", FLAMINGO_MINI, [model.eoc_token_id]
    elif any(name.startswith("perceiver.") for name in tensors):
        peer, table, added = "OpenFlamingo", OPEN_FLAMINGO, [model.eoc_token_id, model.media_token_id]
    else:
        raise InputError(f"{path} is no checkpoint of OpenFlamingo or flamingo-mini: it has no resampler")
    own = model.trainable_state_dict()
    renamed = _rename(tensors, table, own)
    rows, about_rows = _added_rows(model, tensors, added, path)
    try:
        load_trained(model, renamed | rows, f"{path} ({peer})")
    except InputError as error:
        raise InputError(f"{error}: build the model with the settings of flamingo/interop/peers.py") from None
    return f"{path}: {len(renamed)} tensors of {peer} loaded, {about_rows}"


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise InputError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
    raise InputError(f"{path}: no such file or folder")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Name → tensor of a file, without what training and wrapping put around them."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than tensors, or is no checkpoint: such files are not opened") from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path} is damaged: {(str(error).splitlines() or ['it is empty'])[0]}") from None
    if isinstance(tensors, dict):
        tensors = tensors.get("model_state_dict", tensors)  # saved in training, beside the optimizer's state
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{path} is no checkpoint: it is not a table of tensors by name")
    # `module.` is put there by DistributedDataParallel, `flamingo.` by flamingo-mini's outermost class.
    tensors = {re.sub(r"^(module\.)?(flamingo\.)?", "", name): tensor for name, tensor in tensors.items()}
    for pattern, ours in MODELING:
        tensors = {re.sub(pattern, ours, name): tensor for name, tensor in tensors.items()}
    return tensors


def _rename(tensors: dict[str, Tensor], table: list[tuple[str, str]], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained tensors of a peer under our names; a name nobody knows is kept, to be complained about."""
    blocks = (re.fullmatch(r"(.+)\.\d+\.gated_cross_attn_layer\..+", name) for name in own)
    layers = next((match[1] for match in blocks if match), "")  # such as lang_encoder.model.decoder.layers
    renamed = {}
    for name, tensor in tensors.items():
        if name in own and ".additional_" not in name:  # of a language model that was trained too
            renamed[name] = tensor
            continue
        for pattern, ours in table:
            if match := re.fullmatch(pattern, name):
                renamed[match.expand(ours).replace("LAYERS", layers)] = tensor
                break
        else:
            if not name.startswith(FROZEN):
                renamed[name] = tensor
    for key in [name for name in renamed if name.endswith(".to_k.weight")]:
        value = key.replace(".to_k.", ".to_v.")
        if value in renamed:  # one matrix here: its first half makes keys, its second half values
            renamed[key.replace(".to_k.", ".to_kv.")] = torch.cat([renamed.pop(key), renamed.pop(value)])
    frames = renamed.get("perceiver.frame_embs")
    if frames is not None and frames.ndim == 3:
        renamed["perceiver.frame_embs"] = frames.squeeze(1)  # (F, 1, d) → (F, d)
    return renamed


def _added_rows(
    model: VisionLanguageModel, tensors: dict[str, Tensor], ids: list[int], path: Path
) -> tuple[dict[str, Tensor], str]:
    """Our two small tables, in and out, with the rows `ids` as they are in the checkpoint's; and a word about them."""
    inputs = model.lang_encoder.get_input_embeddings()
    small = {name: value.clone() for name, value in model.trainable_state_dict().items() if ".additional_" in name}
    name_in = next(name for name in small if name.endswith("additional_embedding.weight"))
    name_out = next(name for name in small if name.endswith("additional_fc.weight"))
    if (given := _decoupled_rows(small, tensors, (name_in, name_out), path)) is not None:
        return small, given
    table, head = _table(tensors, name_in), _table(tensors, name_out)
    if head is None and model.lang_encoder.config.tie_word_embeddings:
        head = table
    for ours, theirs in ((small[name_in], table), (small[name_out], head)):
        if theirs is None:
            continue
        if len(theirs) <= max(ids) or theirs.shape[1] != ours.shape[1]:
            raise InputError(
                f"the vocabulary of {path} is {tuple(theirs.shape)}, too small for the added ids {ids} or of another "
                f"width than {ours.shape[1]}: it belongs to another language model"
            )
        for i in ids:
            ours[i - inputs.first_id] = theirs[i]
    if table is None:
        return small, "no rows of added tokens (it has none)"
    # A peer may have trained its whole vocabulary; ours is frozen, and this is where the two then differ.
    count = min(len(table), inputs.first_id)
    same = torch.isclose(table[:count].float(), inputs.weight[:count].cpu().float(), rtol=1e-2, atol=1e-3).all(dim=1)
    left_out = f"; {int((~same).sum())} rows of other tokens differ from the language model's and were left out"
    return small, f"and the rows of {len(ids)} added token(s){'' if same.all() else left_out}"


def _decoupled_rows(
    small: dict[str, Tensor], tensors: dict[str, Tensor], names: tuple[str, str], path: Path
) -> str | None:
    """Rows that were decoupled in the checkpoint as well, put into `small`; None if there are none. One row is that of
    <image>, the second of our two. A bias of theirs has no place here."""
    for name in names:
        rows = tensors.get(name)
        if rows is None:
            return None
        if rows.shape[1] != small[name].shape[1] or len(rows) > len(small[name]):
            raise InputError(f"the added rows of {path} are {tuple(rows.shape)}: it belongs to another language model")
        small[name][-len(rows) :] = rows
    bias = tensors.get(names[1].replace(".weight", ".bias"))
    lost = "" if bias is None or not bias.any() else "; their bias in the head was left out"
    return f"and the rows of {len(rows)} added token(s){lost}"


def _table(tensors: dict[str, Tensor], added: str) -> Tensor | None:
    """The peer's vocabulary table that our table `added` stands beside: found by the last part of its name."""
    module = added.split(".")[-3]  # embed_tokens, wte, lm_head, …
    return next((tensor for name, tensor in tensors.items() if f".{name}".endswith(f".{module}.weight")), None)
