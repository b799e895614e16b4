"""What the `forward` of a FlamingoModel is given by name, and a loss as transformers' users ask for it.

What this file teaches: `**options` is a hole in a function. A language model hands on what it does not know, layer by
layer, until it is dropped; so a mistyped `pixel_values` would leave the model blind without a word.
"""

import difflib

import torch.nn.functional as F
from torch import Tensor

from flamingo.model.vlm import next_token_loss

# What pictures are called elsewhere, and no spelling leads from there to here.
ELSEWHERE = {name: "pixel_values" for name in ("image", "images", "pixels", "vision_x")}


def refuse_unread(options: dict, of_lm: set[str], own: list[str]) -> None:
    """Raises TypeError for an option, other than None, that is no argument of the language model.

    own: the arguments beside it, which may have been meant.
    """
    unread = next((name for name, value in options.items() if value is not None and name not in of_lm), None)
    if unread is None:
        return
    near = difflib.get_close_matches(unread, [*own, *sorted(of_lm)], n=1)
    meant = ELSEWHERE.get(unread) or (near[0] if near else None)
    raise TypeError(
        f"forward of FlamingoModel has no argument {unread!r}" + (f": did you mean {meant!r}?" if meant else "")
    )


def reduced_loss(
    mean: Tensor,
    logits: Tensor,
    targets: Tensor,
    shifted: bool,
    reduction: str,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """The loss in the form that was asked for.

    Args:
        mean: of the labelled tokens. logits: (B, T_txt, vocabulary).
        targets: (B, T_txt), what should follow each token.
        shifted: labels had been moved by one already, so that `mean` is of others.
        reduction: mean, sum, or none, which is (B, T_txt - 1). num_items_in_batch: by which to divide in place of the
            number of labelled tokens.

    Raises ValueError for another reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"loss_reduction={reduction!r}: give mean, sum or none")
    if reduction == "none":
        return F.cross_entropy(logits[:, :-1].float().mT, targets[:, :-1], reduction="none")
    if shifted:  # one place further on, to be moved back there
        mean = next_token_loss(F.pad(logits, (0, 0, 0, 1)), F.pad(targets, (1, 0), value=-100))
    divisor = 1 if reduction == "sum" else num_items_in_batch
    return mean if divisor is None else mean * (targets != -100).sum() / divisor
