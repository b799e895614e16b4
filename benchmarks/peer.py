"""OpenFlamingo 2.0.1, imported and left as it is.

What its factory, its loader and its training loop do around the model stands here again for random weights, because
they can only be called with downloaded ones: frozen are all but the resampler, the cross-attention and the input
embeddings; AdamW decays what has `gated_cross_attn` in its name; of the embeddings' gradient all but the two added rows
are set to zero; the gradient's norm is clipped at 1. (open_flamingo: src/factory.py, train/train.py,
train/train_utils.py.)
"""

import copy
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.shapes import PAD, Shape, Text, pad
from flamingo.errors import InputError
from flamingo.fast.precision import autocast

INSTALL = "pip install --no-deps open-flamingo==2.0.1 einops-exts"


def build_peer(shape: Shape, tower: nn.Module, lm: nn.Module) -> nn.Module:
    """Their Flamingo around these backbones. Raises InputError if it is not installed."""
    try:
        from open_flamingo.src.flamingo import Flamingo
        from open_flamingo.src.flamingo_lm import FlamingoLMMixin
        from open_flamingo.src.utils import extend_instance
    except ImportError as error:
        raise InputError(f"the benchmarks compare with OpenFlamingo, which is missing ({error}): {INSTALL}") from error
    tower.output_tokens = True
    extend_instance(lm, FlamingoLMMixin)
    lm.set_decoder_layers_attr_name("model.decoder.layers")
    model = Flamingo(SimpleNamespace(visual=tower), lm, shape.eoc, shape.image, vis_dim=shape.vision_width)
    model.requires_grad_(False)
    model.perceiver.requires_grad_(True)
    model.lang_encoder.gated_cross_attn_layers.requires_grad_(True)
    model.lang_encoder.get_input_embeddings().requires_grad_(True)
    with torch.no_grad():  # gates as after some training: closed ones would hide any difference
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
    return model


class Peer:
    """Their side of the comparison. pictures: (P, 1, 3, H, W)."""

    name = "OpenFlamingo"

    def __init__(self, model: nn.Module, shape: Shape, pictures: Tensor, device: torch.device):
        self.model, self.shape, self.pictures, self.device = model.to(device), shape, pictures, device
        with_decay = [p for n, p in model.named_parameters() if p.requires_grad and "gated_cross_attn" in n]
        without = [p for n, p in model.named_parameters() if p.requires_grad and "gated_cross_attn" not in n]
        groups = [{"params": with_decay, "weight_decay": 0.1}, {"params": without, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6)

    def batch(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """Every text brings its own pictures."""
        input_ids, attention_mask = pad(texts)
        labels = input_ids.masked_fill((input_ids == PAD) | (input_ids == self.shape.image), -100)
        pictures = torch.stack([self.pictures[list(text.pictures)] for text in texts])  # (B, T_img, 1, 3, H, W)
        return {"vision_x": pictures, "lang_x": input_ids, "attention_mask": attention_mask, "labels": labels}

    def loss(self, batch: dict[str, Tensor], dtype: str = "float32") -> Tensor:
        with autocast(self.device, dtype):
            return self.model(**{name: value.to(self.device) for name, value in batch.items()})[0]

    def step(self, texts: Sequence[Text], dtype: str = "float32") -> None:
        """One optimizer step, loading included."""
        self.loss(self.batch(texts), dtype).backward()
        gradient = self.model.lang_encoder.get_input_embeddings().weight.grad
        mask = torch.zeros_like(gradient)
        mask[[self.shape.eoc, self.shape.image]] = 1
        self.model.lang_encoder.get_input_embeddings().weight.grad = gradient * mask
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def generating_in(self, dtype: str) -> "Peer":
        """All of it: under autocast every step would convert every weight."""
        side = copy.copy(self)
        side.model = copy.deepcopy(self.model).to(getattr(torch, dtype))
        return side

    def generate(self, texts: Sequence[Text], **options) -> Tensor:
        input_ids, attention_mask = pad(texts, "left")
        dtype = next(self.model.perceiver.parameters()).dtype
        pictures = torch.stack([self.pictures[list(text.pictures)] for text in texts]).to(self.device, dtype)
        with torch.no_grad():
            return self.model.generate(
                pictures, input_ids.to(self.device), attention_mask.to(self.device), pad_token_id=PAD, **options
            )
