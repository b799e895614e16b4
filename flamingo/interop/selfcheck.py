"""Does this model, with these libraries, say while it generates what it says when it reads?

What this file teaches: a decode step reads one token and takes the rest from a cache, a forward pass reads the whole
text; both must give the same logits. Where a library hands the cache over in another way than we expect, the steps know
nothing of picture and prompt, and every caption is nonsense without an error. Two steps, checked before a model speaks,
take milliseconds.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from flamingo.interop import compat
from flamingo.model.vlm import VisionLanguageModel

STEPS = 3  # generated; the second and third come from the cache
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of the logits' spread


@torch.no_grad()
def check_decoding(model: VisionLanguageModel, autocast: Callable[[], AbstractContextManager] = nullcontext) -> float:
    """How far the logits of cached steps are from those of the whole text, as a share of their spread.

    autocast: makes the context the model generates in.
    Raises InputError, naming the versions, when they are not the same.
    """
    model.eval()
    parameter = next(model.vision_tokenizer.parameters())
    draw = torch.Generator().manual_seed(0)  # its own: no other random number may change
    tokenizer = model.vision_tokenizer
    latents = torch.randn(1, tokenizer.num_latents, tokenizer.dim, generator=draw).to(parameter.device, parameter.dtype)
    others = [i for i in range(3, 12) if i not in (model.media_token_id, model.eoc_token_id, model.pad_token_id)]
    prompt = torch.tensor([[*others[:2], model.media_token_id, *others[2:5]]], device=parameter.device)
    picture = {"latents": latents, "image_index": torch.zeros(1, 1, dtype=torch.long, device=parameter.device)}
    with autocast():
        generated = model.generate(
            prompt, torch.ones_like(prompt), **picture, max_new_tokens=STEPS, min_new_tokens=STEPS,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        steps = torch.stack(generated.logits, dim=1).float()  # (1, STEPS, vocabulary)
        ids = generated.sequences[:, :-1]
        whole = model(ids, torch.ones_like(ids), **picture).logits[:, -STEPS:].float()
    # No softmax sees a number that is added to all logits of a position.
    steps, whole = (logits - logits.mean(dim=-1, keepdim=True) for logits in (steps, whole))
    difference = ((steps - whole).norm() / whole.norm()).item()
    precise = torch.bfloat16 if torch.bfloat16 in {p.dtype for p in model.parameters()} else torch.float32
    if not difference < TOLERANCE[precise]:  # not a number is no agreement either
        raise compat.unlike(
            "transformers",
            f"with torch {compat.installed('torch')} generates other tokens than its own forward pass gives "
            f"(the logits of cached steps are {100 * difference:.0f}% off), so that captions would be nonsense",
        )
    return difference
