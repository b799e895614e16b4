"""Pictures and prompts → captions, in batches: what training shows as it goes and evaluation scores."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flamingo.modeling import Flamingo
from flamingo.processor import Chunk, FlamingoProcessor


@torch.no_grad()
def encode_pictures(
    model: Flamingo,
    processor: FlamingoProcessor,
    pictures: Sequence[Image.Image],
    *,
    autocast: AbstractContextManager | None = None,
    batch_size: int = 64,
) -> Tensor:
    """N pictures → the bank of their latents (N, n, d): encoded and resampled once, however often they are used."""
    device = next(model.perceiver.parameters()).device
    bank = []
    with autocast or nullcontext():
        for first in range(0, len(pictures), batch_size):
            pixels = processor.preprocess_images(pictures[first : first + batch_size]).to(device)
            bank.append(model.tokenize_images(model.encode_images(pixels)).float())
    return torch.cat(bank)


@torch.no_grad()
def caption(
    model: Flamingo,
    processor: FlamingoProcessor,
    latents: Tensor,
    prompts: Sequence[str],
    *,
    picture_of: Sequence[int] | None = None,
    blind: bool = False,
    autocast: AbstractContextManager | None = None,
    batch_size: int = 128,
    progress: str | None = None,
    **generation_options,
) -> list[str]:
    """One caption for each prompt.

    Args:
        latents: (N, n, d) the bank. picture_of: which picture each prompt is about; the i-th by default.
        prompts: what follows <image>, such as a style's cue; may be empty.
        blind: take the pictures away (a control).
        progress: title of a progress bar, none if not given.
        generation_options: see `Flamingo.generate`.
    """
    picture_of = list(range(len(prompts))) if picture_of is None else list(picture_of)
    rows = [processor.encode_chunks([Chunk(0, prompt)], open_end=True)[0] for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # prompts of one length need no padding
    captions = [""] * len(rows)
    bar = tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False)
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        input_ids, attention_mask = (t.to(latents.device) for t in processor.pad([rows[i] for i in chosen], "left"))
        index = torch.tensor([[picture_of[i]] for i in chosen], device=latents.device)
        pictures = {"blind": True} if blind else {"latents": latents, "image_index": index}
        with autocast or nullcontext():
            generated = model.generate(input_ids, attention_mask, **pictures, **generation_options)
        for i, text in zip(chosen, processor.decode_captions(generated, input_ids.shape[1]), strict=True):
            captions[i] = text
        bar.update(len(chosen))
    bar.close()
    return captions
