"""A language stream that goes on behind a cache, when a user steps through a text by hand.

What this file teaches: in a stream the places that were read are more than the tokens of the text, and some of them may
be empty (texts with fewer pictures than others). So the mask of all that was read is kept beside the cache, and what
follows continues both mask and positions. (`generate` does this by itself.)
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import Cache

from flamingo.interop import compat
from flamingo.model.generation import positions_of
from flamingo.model.vlm import Text


def behind(text: Text, past: Cache | None, lm: nn.Module) -> Text:
    """The text to call the language model with, its mask and positions behind what the cache `past` holds.

    text: its attention_mask may be that of the whole text; of which the last columns count.
    """
    tokens = text.input_ids if text.inputs_embeds is None else text.inputs_embeds
    new = torch.ones_like(tokens[..., 0] if tokens.ndim == 3 else tokens, dtype=torch.long)  # (B, T)
    if text.attention_mask is not None:
        new = text.attention_mask[:, -new.shape[1] :].long()
    read = compat.tokens_read(past)
    if not read:
        return replace(text, attention_mask=new)
    so_far = getattr(past, "text_so_far", None)
    before = new.new_ones(1, read) if so_far is None else so_far.attention_mask
    before = before.repeat_interleave(len(new) // len(before), dim=0)  # beams of a text stand side by side
    whole = torch.cat([before, new], dim=1)
    return replace(text, attention_mask=whole, **positions_of(lm, whole, last=new.shape[1]))
