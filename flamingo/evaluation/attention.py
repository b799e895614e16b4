"""Where in the picture was the model looking when it generated a word?

What this file teaches: a word attends to latents, and the latents attend to patches; multiplied, the two attentions
show which patches a word drew on. Attention is recomputed here, from the layers' inputs, by hooks that are there only
inside `recorded_attention`: the model's own fast attention never holds these matrices.

    word → latents    mean over heads, then over layers, weighted by |tanh(attention gate)|: a closed layer adds 0
                      (or one layer, or one head: `View`)
    latents → patches in the resampler, mean over heads; over several layers as attention rollout (Abnar & Zuidema
                      2020): each layer passes on half of what a latent held and adds half of what it attends to

It is where the model looked, not proof of why it chose a word. In the classroom we know where each thing stands, so
`hit_rate` counts how often the peak is on the thing that was named, beside the rate of a peak put down at random.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flamingo.classroom import scenes
from flamingo.data.chunks import Chunk
from flamingo.data.processor import FlamingoProcessor
from flamingo.evaluation.captioning import Picture, prepared
from flamingo.model.cross_attention import MaskedCrossAttention, MediaMask
from flamingo.model.resampler import PerceiverAttention, PerceiverResampler
from flamingo.model.vlm import Flamingo, VisionLanguageModel


# ------------------------------------------------------------------------------------------ recomputed attention
def cross_attention_weights(
    attn: MaskedCrossAttention, x: Tensor, keys_values: tuple[Tensor, Tensor], media_mask: MediaMask
) -> Tensor:
    """Text → latents, (B, h, T_txt, T_img·n): what `MaskedCrossAttention.forward` uses and does not keep.

    Rows of tokens that see no picture are 0.
    """
    q, k, _, mask = attn.attention_inputs(attn.to_q(attn.norm(x)), keys_values, media_mask)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) * media_mask.sees_image[:, None]


def resampler_weights(attn: PerceiverAttention, x: Tensor, latents: Tensor) -> Tensor:
    """Latents → patches and latents, (N, h, n, k + n)."""
    q, k, _ = attn.queries_keys_values(x, latents)
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)


@contextmanager
def _recorded(modules: Sequence[nn.Module], weights: Callable[..., Tensor]) -> Iterator[list[Tensor]]:
    """Inside, a list that each module adds `weights(module, *its inputs)` to, in the order of the calls."""
    recorded: list[Tensor] = []
    look = lambda module, inputs: recorded.append(weights(module, *inputs))  # noqa: E731
    hooks = [module.register_forward_pre_hook(look) for module in modules]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def recorded_cross_attention(model: Flamingo, weights: Callable[..., Tensor] = cross_attention_weights):
    """Inside, a list that each cross-attention adds its weights (B, h, T_txt, T_img·n) to, computed a second time."""
    return _recorded([block.attn for block in model.cross_attention_blocks()], weights)


def can_be_recorded(model: VisionLanguageModel) -> bool:
    """Is it resampler and cross-attention that lie between patch and word?"""
    return isinstance(model.vision_tokenizer, PerceiverResampler) and bool(model.cross_attention_blocks())


@dataclass(frozen=True)
class View:
    """Which of the word's looks at the latents to show: of one cross-attention layer (its number among those that look)
    or of all; of one head or the mean of all."""

    layer: int | None = None
    head: int | None = None


WHOLE = View()


@dataclass
class Recorded:
    """text_to_latents: one (B, h, T_txt, T_img·n) a cross-attention layer. resampler: one (N, n, k + n) a layer, means
    over heads."""

    text_to_latents: list[Tensor]
    resampler: list[Tensor]


@contextmanager
def recorded_attention(model: Flamingo) -> Iterator[Recorded]:
    """Inside, every attention of the model's new parts is computed a second time and recorded."""
    resampler = [attn for attn, _ in model.vision_tokenizer.layers]
    with (
        recorded_cross_attention(model) as looks,
        _recorded(resampler, lambda *call: resampler_weights(*call).mean(dim=1)) as resampled,
    ):
        yield Recorded(looks, resampled)


def latents_to_patches(resampler: Sequence[Tensor], patches: int) -> Tensor:
    """One (N, n, k + n) a layer → (N, n, k): how much each latent holds of each patch, rows sum to 1."""
    held = torch.zeros_like(resampler[0][:, :, :patches])
    for weights in resampler:
        looks = weights[:, :, :patches] + weights[:, :, patches:] @ held
        held = 0.5 * held + 0.5 * looks
    return held / held.sum(dim=-1, keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def text_to_patches(
    model: Flamingo, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, autocast=nullcontext,
    view: View = WHOLE,
) -> Tensor:  # fmt: skip
    """Texts about one picture each → (B, T_txt, k): each token's attention, from 0 to 1, over the k = F·v patches.

    pixel_values: (B, 1, F, C, H, W).
    """
    with recorded_attention(model) as recorded, autocast():
        features = model.encode_images(pixel_values[:, 0])  # (B, F, v, d)
        model(input_ids, attention_mask, features=features[:, None])
    gates = [abs(attn) for attn, _ in model.gates()]
    if view.layer is not None:
        gates = [float(i == view.layer) for i in range(len(gates))]
    heads = slice(None) if view.head is None else slice(view.head, view.head + 1)
    by_layer = [weights[:, heads].float().mean(dim=1) for weights in recorded.text_to_latents]
    looks = sum(gate * weights for gate, weights in zip(gates, by_layer, strict=True))
    looks = looks / max(sum(gates), 1e-12)  # (B, T_txt, n)
    return looks @ latents_to_patches([w.float() for w in recorded.resampler], features.shape[1] * features.shape[2])


# ------------------------------------------------------------------------------------------------ words and places
@dataclass
class WordLook:
    """A word of a caption and where the model looked when it generated it: grid (rows, columns), sum about 1."""

    picture: int
    word: str
    grid: Tensor


def _word_tokens(processor: FlamingoProcessor, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words that tokens spell, each with the positions of its tokens."""
    spelt, owner = "", []
    for place, token in enumerate(ids):
        piece = processor.tokenizer.decode([token])
        spelt += piece
        owner += [place] * len(piece)
    return [
        (match.group().lower(), sorted(set(owner[match.start() : match.end()])))
        for match in re.finditer(r"[^\W_]+", spelt)
    ]


def word_looks(
    model: Flamingo,
    processor: FlamingoProcessor,
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    captions: Sequence[str],
    *,
    autocast=nullcontext,
    batch_size: int = 32,
    view: View = WHOLE,
) -> list[WordLook]:
    """For each word of each caption of the picture of the same number: the mean over its tokens of where the model
    looked when it predicted them (that is at the position before each). Empty if the patches form no square."""
    device = next(model.vision_tokenizer.parameters()).device
    looks = []
    for first in range(0, len(pictures), batch_size):
        numbers = range(first, min(first + batch_size, len(pictures)))
        pixels = prepared(processor, [pictures[i] for i in numbers]).to(device)[:, None]
        given = [processor.encode_chunks([Chunk(0, prompts[i], captions[i])])[0] for i in numbers]
        drawn = [len(processor.encode_chunks([Chunk(0, prompts[i])], open_end=True)[0]) for i in numbers]
        input_ids, attention_mask = (t.to(device) for t in processor.pad(given))
        maps = text_to_patches(model, input_ids, attention_mask, pixels, autocast, view).cpu()  # (B, T_txt, k)
        if getattr(model.vision_encoder, "class_token", False):
            maps = maps[:, :, 1:]
        side = math.isqrt(maps.shape[2])
        if side * side != maps.shape[2]:
            return []
        for b, i in enumerate(numbers):
            for word, places in _word_tokens(processor, given[b][drawn[b] : -1]):  # the last is <|endofchunk|>
                at = [drawn[b] + place - 1 for place in places]
                looks.append(WordLook(i, word, maps[b, at].mean(dim=0).view(side, side)))
    return looks


def hit_rate(looks: Sequence[WordLook], drawn: Sequence[scenes.Scene]) -> dict:
    """How often attention is on the thing when its name is generated: {attention_hit_rate, chance, n}; None if n is 0.

    A hit: the middle of the patch with the most attention lies in the box of a thing of that name (one of its boxes, if
    there are several). chance: the mean share of patches whose middle lies there. Names of things that are not in the
    picture do not count.
    """
    hits, chances = [], []
    for look in looks:
        boxes = [p.box for p in drawn[look.picture].objects if look.word in (p.name, scenes.plural(p.name))]
        if not boxes:
            continue
        rows, columns = look.grid.shape
        middles = [((column + 0.5) / columns, (row + 0.5) / rows) for row in range(rows) for column in range(columns)]
        inside = torch.tensor([any(_inside(box, x, y) for box in boxes) for x, y in middles])  # (k,)
        hits.append(bool(inside[look.grid.argmax()]))
        chances.append(inside.float().mean().item())
    if not hits:
        return {"attention_hit_rate": None, "chance": None, "n": 0}
    return {"attention_hit_rate": sum(hits) / len(hits), "chance": sum(chances) / len(chances), "n": len(hits)}


def _inside(box: tuple[int, int, int, int], x: float, y: float) -> bool:
    """Is the point, in shares of the picture's width and height, in the box?"""
    left, top, right, bottom = (side / scenes.IMAGE_SIZE for side in box)
    return left <= x < right and top <= y < bottom
