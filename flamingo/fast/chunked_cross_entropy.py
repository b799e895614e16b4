"""The loss, without ever holding all logits.

Replaces: `predict` of model/vlm.py where there are labels: the head runs on labelled tokens only, a chunk at a time.
Gains: see README, *What each piece is worth*.

What this file teaches: the logits are the largest tensor of a training step. 835 captioned tokens × the 50267 of
OPT-125m's vocabulary are 168 MB in float32, and softmax, its gradient and the conversions each want as much again.
Nobody needs them all at once. So the head runs on a chunk of the tokens, the loss of the chunk and its gradient are
worked out on the spot, and its logits are forgotten. (Liger-Kernel does this for GPUs, in one kernel.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from flamingo.fast.packing import TextLayout
from flamingo.model.language_model import FlamingoLMMixin
from flamingo.model.vlm import Text

LOGITS_AT_ONCE = 2**23  # 32 MiB in float32
NOT_KEPT = ("output_hidden_states", "output_attentions")  # who wants these gets them from the plain way


class ChunkedLossMixin:
    """For a `VisionLanguageModel` whose language model is its decoder and then its head, nothing else."""

    def predict(self, text: Text, layout: TextLayout | None = None, **lm_options):
        """As `VisionLanguageModel.predict`; with labels `.logits` is None.

        layout: of this batch. Made here if it is not given, which on a GPU waits for the values.
        """
        if text.labels is None or any(lm_options.get(name) for name in NOT_KEPT):
            return super().predict(text, **lm_options)
        layout = layout or TextLayout.of(text.labels, text.attention_mask)
        head = self.lang_encoder.get_output_embeddings()
        hidden = self.labelled_hidden_states(text, layout)
        return CausalLMOutput(loss=chunked_cross_entropy(head, hidden, layout.targets))

    def labelled_hidden_states(self, text: Text, layout: TextLayout) -> Tensor:
        """(K, D) what the head reads where a token with a label comes next."""
        lm = self.lang_encoder
        if isinstance(lm, FlamingoLMMixin):  # base_model below goes around the mixin, which does this
            lm.condition_on_text(text.inputs_embeds if text.input_ids is None else text.input_ids)
        hidden = text.at_tokens(lm.base_model(**text.inputs(), use_cache=False).last_hidden_state)  # (B, T_txt, D)
        return hidden.flatten(0, 1).index_select(0, layout.labelled)


def chunked_cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of head(hidden) with the targets: the same loss and the same gradients.

    hidden: (K, D). targets: (K,) token ids. 0 if K is 0.
    """
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    return _SumOfChunks.apply(head, targets, torch.is_grad_enabled(), hidden, *weights) / max(1, len(targets))


class _SumOfChunks(torch.autograd.Function):
    """The sum of the losses. Forward finds the gradients as well, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx, head: nn.Module, targets: Tensor, training: bool, hidden: Tensor, *weights: Tensor) -> Tensor:
        inputs = (hidden, *weights)
        total, gradients = hidden.new_zeros((), dtype=torch.float32), [torch.zeros_like(x) for x in inputs]
        rows = max(1, LOGITS_AT_ONCE // head.out_features)
        for first in range(0, len(hidden), rows):
            chunk = slice(first, first + rows)
            some = hidden[chunk].detach().requires_grad_(training)
            with torch.set_grad_enabled(training):
                logits = head(some.view_as(some))  # a view: the hooks of torch's FLOP counter cannot wait for a leaf
                loss = F.cross_entropy(logits.float(), targets[chunk], reduction="sum")
            total += loss.detach()
            if training:
                of_hidden, *of_weights = torch.autograd.grad(loss, (some, *weights))
                gradients[0][chunk] = of_hidden
                for whole, gradient in zip(gradients[1:], of_weights, strict=True):
                    whole += gradient
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        return None, None, None, *(gradient * scale for gradient in ctx.gradients)
