"""The same numbers, sooner: fast pieces laid on a plain model from outside.

What this file teaches: a model can be read without knowing how it is made fast. Each piece is a mixin that takes the
place of one method of a live part, by the same `extend_instance` that makes a Flamingo of a language model:

    grouped                 MaskedCrossAttention.attend          grouped_attention.py
    chunked                 VisionLanguageModel.predict          chunked_cross_entropy.py
    packed                  … and the padded batch in it         packing.py
    few_at_once             VisionEncoder.patch_features         few_at_once.py

No tensor changes its name or its value. `enable` compares fast and plain on two short texts before it returns: a
library that changed is then an error, not a wrong number.
"""

import torch

from flamingo.fast.chunked_cross_entropy import ChunkedLossMixin
from flamingo.fast.few_at_once import FewAtOnceMixin
from flamingo.fast.grouped_attention import GroupedMixin
from flamingo.fast.packing import ATTENTION, PackedQueriesMixin, PackedTextsMixin, can_pack
from flamingo.interop import compat
from flamingo.model.language_model import extend_instance
from flamingo.model.vision import VisionEncoder
from flamingo.model.vlm import VisionLanguageModel

PIECES = ("grouped", "chunked", "packed", "few_at_once")
TOLERANCE = 1e-3  # of the loss; rounding is far below it


def enable(model: VisionLanguageModel, pieces: tuple[str, ...] = PIECES) -> list[str]:
    """Install what this model and this machine allow, and see that the loss stays the same. In place, for good.

    pieces: of PIECES, in this order; packed needs chunked. Returns those that were installed.
    Raises InputError, naming the library, when the fast model has another loss than the plain one.
    """
    training = model.training
    model.eval()  # dropout would make any two trials differ
    chosen: list[str] = []
    for piece in pieces:
        chosen += [piece] if _fits(model, piece, chosen) else []
    before = _trial_losses(model)
    install(model, chosen)
    after = _trial_losses(model)
    model.train(training)
    for plain, fast in zip(before, after, strict=True):
        if not abs(plain - fast) <= TOLERANCE * abs(plain):  # not a number is no agreement either
            what = f"computes another loss by flamingo/fast ({fast:.4f}) than by the plain model ({plain:.4f})"
            raise compat.unlike("transformers", f"{what}, so use --plain")
    return chosen


def install(model: VisionLanguageModel, pieces: list[str]) -> None:
    """As `enable`, without a look at what this model allows."""
    attentions = [block.attn for block in model.cross_attention_blocks()]
    mixins = {
        "grouped": [(attention, GroupedMixin) for attention in attentions],
        "chunked": [(model, ChunkedLossMixin)],
        "packed": [(model, PackedTextsMixin), *((attention, PackedQueriesMixin) for attention in attentions)],
        "few_at_once": [(model.vision_encoder, FewAtOnceMixin)],
    }
    for piece in pieces:
        for part, mixin in mixins[piece]:
            if not isinstance(part, mixin):
                extend_instance(part, mixin)
    if "packed" in pieces:
        compat.set_attention(model.lang_encoder, ATTENTION)


def _fits(model: VisionLanguageModel, piece: str, chosen: list[str]) -> bool:
    if piece == "chunked":
        return head_is_last(model)
    if piece in ("grouped", "packed") and not model.cross_attention_blocks():
        return False  # a text with its pictures in it has other lengths than the batch says
    if piece == "packed":
        return "chunked" in chosen and can_pack(model.lang_encoder)
    if piece == "few_at_once":
        return isinstance(model.vision_encoder, VisionEncoder) and _device(model).type == "cpu"
    return True


def _device(model: VisionLanguageModel) -> torch.device:
    return next(model.vision_tokenizer.parameters()).device


@torch.no_grad()
def head_is_last(model: VisionLanguageModel) -> bool:
    """Is the language model its decoder and then its head? (Granite scales its logits after the head.) Found by trying,
    so that no table has to know."""
    lm = model.lang_encoder
    if lm.base_model is lm:
        return False
    ids = _trial_texts(model)[:1, :4]
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.equal(lm.get_output_embeddings()(hidden), lm(input_ids=ids, use_cache=False).logits)


def _trial_texts(model: VisionLanguageModel) -> torch.Tensor:
    """(2, 8) ids: <image> and seven others, and <image>, five others and padding."""
    special = (model.media_token_id, model.eoc_token_id, model.pad_token_id)
    others = [i for i in range(3, 16) if i not in special][:6]
    rows = [[others[0], model.media_token_id, *others], [model.media_token_id, *others[2:], others[0]]]
    rows[1] += [model.pad_token_id] * (len(rows[0]) - len(rows[1]))
    return torch.tensor(rows, device=_device(model))


@torch.no_grad()
def _trial_losses(model: VisionLanguageModel) -> list[float]:
    """Of two texts of one picture, and of two texts of a picture each; with open gates, so that the pictures matter."""
    ids = _trial_texts(model)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill((mask == 0) | (ids == model.media_token_id), -100)
    tokenizer, draw = model.vision_tokenizer, torch.Generator().manual_seed(0)
    latents = torch.randn(2, tokenizer.num_latents, tokenizer.dim, generator=draw).to(ids.device)
    banks = {"latents": latents[:1], "texts_per_image": 2}, {"latents": latents, "texts_per_image": 1}
    gates = [gate for block in model.cross_attention_blocks() for gate in (block.attn_gate, block.ff_gate)]
    values = [gate.clone() for gate in gates]
    try:
        for gate in gates:
            gate.fill_(1.0)
        return [model(ids, mask, labels, **images).loss.item() for images in banks]
    finally:
        for gate, value in zip(gates, values, strict=True):
            gate.copy_(value)
