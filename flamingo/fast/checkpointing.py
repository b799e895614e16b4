"""Gradient checkpointing: forget what a layer computed, and compute it again going backward.

Replaces: the forward of each `FlamingoLayer`, or of each decoder layer of a language stream, which keep what their
backward pass needs. Less memory, a third more time.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flamingo.interop import compat
from flamingo.model.language_model import FlamingoLMMixin, extend_instance
from flamingo.model.vlm import VisionLanguageModel


class CheckpointedMixin:
    """For a `FlamingoLayer`."""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if not (self.gradient_checkpointing and self.is_conditioned and torch.is_grad_enabled()):
            return super().forward(hidden_states, *args, **kwargs)
        # By the time the backward pass comes here again the conditioning is gone: it is handed over, not looked up.
        seen = (self.media_keys_values(), self.media_mask)
        return checkpoint(self.cross_attend_then_decode, hidden_states, *seen, *args, use_reentrant=False, **kwargs)


class CheckpointedDecoderMixin:
    """For a decoder layer that does not look, frozen or not: of a language stream, or between two that do.
    (transformers' own checkpointing rests in eval mode, in which a frozen language model always is.)"""

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, *args, **kwargs)
        return checkpoint(super().forward, hidden_states, *args, use_reentrant=False, **kwargs)


def checkpoint_layers(model: VisionLanguageModel, on: bool = True) -> None:
    """Every decoder layer, those that look with their cross-attention. In place.

    on: from now on. If not, those that look, as soon as their `gradient_checkpointing` is set, which is transformers'
    way.
    """
    lm = model.lang_encoder
    looking = lm._get_decoder_layers() if isinstance(lm, FlamingoLMMixin) else []
    for layer in looking:
        if not isinstance(layer, CheckpointedMixin):
            extend_instance(layer, CheckpointedMixin)
        layer.gradient_checkpointing = on
    for layer in compat.find_decoder_layers(lm)[1] if on else ():
        if not isinstance(layer, (CheckpointedMixin, CheckpointedDecoderMixin)):
            extend_instance(layer, CheckpointedDecoderMixin)
