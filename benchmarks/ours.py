"""Our side of the comparison: what train.py does, without its log."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.shapes import PAD, Shape, Text, pad
from flamingo.config import ModelConfig, TrainingOptions
from flamingo.data.batches import Batch, caption_labels, point_at_bank
from flamingo.data.feature_cache import FeatureCache
from flamingo.fast.chunked_cross_entropy import ChunkedLossMixin
from flamingo.fast.enable import PIECES, enable
from flamingo.fast.inference import prepare_to_generate
from flamingo.fast.packing import TextLayout
from flamingo.fast.precision import autocast
from flamingo.model.build import build_from_parts
from flamingo.model.vision import OpenClipEncoder
from flamingo.model.vlm import SpecialTokens, VisionLanguageModel
from flamingo.training.optimizer import make_optimizer


def build_ours(
    shape: Shape, tower: nn.Module, lm: nn.Module, peer: nn.Module | None = None, fast: Sequence[str] = PIECES
) -> VisionLanguageModel:
    """Our Flamingo around these backbones, with the peer's trained weights if it is given. fast: pieces of it."""
    encoder = OpenClipEncoder(tower, "random ViT", lambda picture: picture)
    tokens = SpecialTokens(shape.image, shape.eoc, PAD)
    model = build_from_parts(ModelConfig(), encoder, lm, tokens, shape.vision_width)
    if peer is not None:
        take_trained_weights(model, peer, shape)
    if fast:
        enable(model, tuple(fast))
    return model


def take_trained_weights(model: VisionLanguageModel, peer: nn.Module, shape: Shape) -> None:
    """The names are the same but for the added tokens, which are rows of the peer's tables."""
    theirs = peer.state_dict()
    rows = slice(shape.eoc, shape.image + 1)
    added = {
        "additional_embedding.weight": theirs["lang_encoder.model.decoder.embed_tokens.weight"][rows],
        "additional_fc.weight": theirs["lang_encoder.lm_head.weight"][rows],
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                ending = next((ending for ending in added if name.endswith(ending)), None)
                parameter.copy_(added[ending] if ending else theirs[name])


class Ours:
    """pictures: (P, 1, 3, H, W). cache: features in their place."""

    name = "ours"
    dtype = "float32"  # of generation

    def __init__(
        self,
        model: VisionLanguageModel,
        shape: Shape,
        pictures: Tensor,
        device: torch.device,
        cache: FeatureCache | None = None,
    ):
        self.model, self.shape, self.pictures = model.to(device), shape, pictures
        self.device, self.cache = device, cache
        self.optimizer = make_optimizer(model, TrainingOptions(lr=1e-6, gate_lr=1e-6))

    def batch(self, texts: Sequence[Text]) -> Batch:
        """Pictures of the texts, each once (those of neighbouring texts: the captions of a picture lie together)."""
        bank: list[int] = []
        rows = []
        for text in texts:
            if bank[-len(text.pictures) :] != list(text.pictures):
                bank += text.pictures
            rows.append(list(range(len(bank) - len(text.pictures), len(bank))))
        input_ids, mask = pad(texts)
        labels = caption_labels(input_ids, mask, self.shape.image, self.shape.eoc)
        read = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, **point_at_bank(rows, len(bank))}
        if isinstance(self.model, ChunkedLossMixin):
            read["layout"] = TextLayout.of(labels, mask)
        if self.cache is None:
            return Batch(pixel_values=self.pictures[bank], **read)
        return Batch(features=torch.cat([self.cache[i : i + 1] for i in bank]), **read)

    def loss(self, batch: Batch, dtype: str = "float32") -> Tensor:
        with autocast(self.device, dtype):
            return self.model(**batch.to(self.device).inputs()).loss

    def step(self, texts: Sequence[Text], dtype: str = "float32") -> Tensor:
        """One optimizer step, loading included → its loss."""
        loss = self.loss(self.batch(texts), dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def generating_in(self, dtype: str) -> "Ours":
        """As evaluate.py generates in it."""
        side = copy.copy(self)
        side.model, side.dtype = copy.deepcopy(self.model), dtype
        prepare_to_generate(side.model, dtype)
        return side

    def generate(self, texts: Sequence[Text], **options) -> Tensor:
        batch = self.batch(texts).to(self.device)
        input_ids, mask = (t.to(self.device) for t in pad(texts, "left"))
        names = ("pixel_values", "image_index", "texts_per_image")
        bank = {name: value for name in names if (value := getattr(batch, name)) is not None}
        with autocast(self.device, self.dtype):
            return self.model.generate(input_ids, mask, **bank, **options)
