"""Pictures and prompts → captions, in batches: what training shows as it goes and evaluation scores."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flamingo import ranks
from flamingo.data.chunks import Chunk
from flamingo.data.processor import FlamingoProcessor, pad_image_index
from flamingo.evaluation.typical import most_typical
from flamingo.interop import compat
from flamingo.model.vlm import Flamingo

NEW_TOKENS = 32  # longest caption, in tokens
Picture = Image.Image | Callable[[], Image.Image]  # one, or what reads it when it is needed
TEMPERATURE = 0.5  # of candidates: at 1 one in two has a word that is wrong
CANDIDATES = 640  # answers scored at a time, over all texts: the logits of each need memory


def prepared(processor: FlamingoProcessor, pictures: Sequence[Picture]) -> Tensor:
    """N pictures → (N, F=1, C, H, W). One after the other is opened, so that no two large ones are in memory."""
    return processor.preprocess_images(picture() if callable(picture) else picture for picture in pictures)


@dataclass(frozen=True)
class Decoding:
    """How a caption is chosen.

    beams: that many beginnings are followed at once, and the likeliest whole caption wins. candidates: so many captions
    are drawn at random, and the one that has most in common with the others is given: what is said in one of them only
    is more often wrong than what most of them say (minimum Bayes risk, Kumar and Byrne 2004). 1 and 1: the likeliest
    token each time. consensus: captions of the training pictures help to choose (consensus.py).
    """

    beams: int = 1
    candidates: int = 1
    consensus: bool = False

    def options(self) -> dict:
        """For `generate`."""
        if self.candidates > 1:
            return _drawing(self.candidates, TEMPERATURE)
        return {"num_beams": self.beams} if self.beams > 1 else {}


def _drawing(count: int, temperature: float) -> dict:
    """For `generate`: so many texts drawn at random."""
    return {"do_sample": True, "num_return_sequences": count, "temperature": temperature}


GREEDY = Decoding()


@torch.no_grad()
def encode_and_pool(
    model: Flamingo,
    processor: FlamingoProcessor,
    pictures: Sequence[Picture],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    batch_size: int = 64,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """N pictures → the bank of their latents (N, n, d), and one unit vector for each, the mean of its features (N, d).

    Encoded and resampled once, however often they are used. The vectors show which pictures are alike.
    """
    device = next(model.vision_tokenizer.parameters()).device
    found = {}  # number of the first picture → latents and vectors of a batch
    shared, batches = _can_share(model), range(0, len(pictures), batch_size)
    bar = tqdm(total=len(pictures), desc=progress, disable=progress is None, leave=False)
    with autocast():
        for first in ranks.share(batches) if shared else batches:
            pixels = prepared(processor, pictures[first : first + batch_size]).to(device)
            features = model.encode_images(pixels)  # (N, F, v, d)
            vectors = F.normalize(features.float().mean(dim=(1, 2)), dim=-1)
            found[first] = model.tokenize_images(features).float().cpu(), vectors.cpu()
            bar.update(len(pixels) * (ranks.count() if shared else 1))
    bar.close()
    if shared:
        found = {first: some for part in ranks.gathered(found) for first, some in part.items()}
    latents, pooled = zip(*(found[first] for first in batches), strict=True)
    return torch.cat(latents).to(device), torch.cat(pooled).to(device)


def encode_pictures(model: Flamingo, processor: FlamingoProcessor, pictures: Sequence[Picture], **how) -> Tensor:
    """N pictures → the bank of their latents (N, n, d). how: see `encode_and_pool`."""
    return encode_and_pool(model, processor, pictures, **how)[0]


def _in_batches(
    processor: FlamingoProcessor,
    latents: Tensor,
    texts: Sequence[Sequence[Chunk]],
    batch_size: int,
    progress: str | None,
    answer: Callable[[Tensor, Tensor, dict], Sequence],
    shared: bool,
) -> list:
    """`answer(input_ids, attention_mask, pictures)` for texts that are to be continued, texts of like length together.

    Each text's `Chunk.picture` are rows of the bank `latents`. shared: of several processes each does some of the
    batches, and all have all answers.
    """
    rows = [processor.encode_chunks(text, open_end=True)[0] for text in texts]
    shown = [[chunk.picture for chunk in text if chunk.picture is not None] for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # texts of one length need no padding
    if shared:
        batch_size = min(batch_size, math.ceil(len(order) / ranks.count()))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    found = {}  # number of the text → its answer
    bar = tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False)
    for chosen in ranks.share(batches) if shared else batches:
        input_ids, attention_mask = (t.to(latents.device) for t in processor.pad([rows[i] for i in chosen], "left"))
        index = pad_image_index([shown[i] for i in chosen])
        pictures = {"latents": latents, "image_index": index.to(latents.device)}
        found |= dict(zip(chosen, answer(input_ids, attention_mask, pictures), strict=True))
        bar.update(len(chosen) * (ranks.count() if shared else 1))
    bar.close()
    if shared:
        found = {i: value for part in ranks.gathered(found) for i, value in part.items()}
    return [found[i] for i in range(len(rows))]


def _can_share(model: Flamingo) -> bool:
    """A model whose weights lie in pieces in all processes answers in all of them at once."""
    return ranks.count() > 1 and not any(map(compat.is_sharded, model.parameters()))


@torch.no_grad()
def continue_texts(
    model: Flamingo,
    processor: FlamingoProcessor,
    latents: Tensor,
    texts: Sequence[Sequence[Chunk]],
    *,
    blind: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    batch_size: int = 128,
    progress: str | None = None,
    decoding: Decoding = GREEDY,
    **generation_options,
) -> list[str]:
    """What the model generates at the end of each text, whose last chunk has a picture and a prompt but no caption.

    Args:
        latents: (N, n, d) the bank. texts: `Chunk.picture` is a row of the bank.
        blind: take the pictures away (a control).
        autocast: makes the context that sets the precision. progress: title of a progress bar, none if not given.
        decoding: how one of many possible texts is chosen (candidates are drawn by torch's global generator).
        generation_options: see `Flamingo.generate`.
    """
    options, count = {"max_new_tokens": NEW_TOKENS} | decoding.options() | generation_options, decoding.candidates
    how = {"blind": blind, "autocast": autocast, "batch_size": max(1, batch_size // decoding.beams)}
    several = _continuations(model, processor, latents, texts, count, options, progress=progress, **how)
    return [captions[0] if count == 1 else most_typical(captions) for captions in several]


@torch.no_grad()
def draw_texts(
    model: Flamingo, processor: FlamingoProcessor, latents: Tensor, texts: Sequence[Sequence[Chunk]], count: int, *,
    temperature: float, autocast: Callable[[], AbstractContextManager] = nullcontext, batch_size: int = 128,
    progress: str | None = None,
) -> list[list[str]]:  # fmt: skip
    """`count` continuations of each text, drawn at random by torch's global generator; else as `continue_texts`."""
    options = {"max_new_tokens": NEW_TOKENS} | _drawing(count, temperature)
    return _continuations(
        model, processor, latents, texts, count, options, blind=False, autocast=autocast, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip


def _continuations(
    model: Flamingo, processor: FlamingoProcessor, latents: Tensor, texts: Sequence[Sequence[Chunk]], count: int,
    options: dict, *, blind: bool, autocast: Callable[[], AbstractContextManager], batch_size: int,
    progress: str | None,
) -> list[list[str]]:  # fmt: skip
    """The `count` texts that `generate` gives with these options for each text."""

    def answer(input_ids: Tensor, attention_mask: Tensor, pictures: dict) -> list[list[str]]:
        with autocast():
            generated = model.generate(input_ids, attention_mask, **({"blind": True} if blind else pictures), **options)
        said = processor.decode_captions(generated, input_ids.shape[1])
        return [said[first : first + count] for first in range(0, len(said), count)]

    batch_size = max(1, batch_size // count)
    shared = _can_share(model) and count == 1  # candidates are drawn one after the other
    return _in_batches(processor, latents, texts, batch_size, progress, answer, shared)


@torch.no_grad()
def score_answers(
    model: Flamingo,
    processor: FlamingoProcessor,
    latents: Tensor,
    texts: Sequence[Sequence[Chunk]],
    answers: Sequence[str],
    *,
    blind: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    batch_size: int = 32,
    progress: str | None = None,
) -> Tensor:
    """The log-likelihood of each of K answers, with its <|endofchunk|>, at the end of each of B texts: (B, K), nats.

    The end counts: without it "a fire" would always be at least as likely as "a fireplace". blind: take the pictures
    away (a control).
    """
    begin = len(processor.begin_ids) + 1  # and <image>: what follows is the answer as the model is trained on it
    ids = [processor.encode_chunks([Chunk(0, "", text)])[0][begin:] for text in answers]

    def answer(input_ids: Tensor, attention_mask: Tensor, pictures: dict) -> Tensor:
        with autocast():
            shown = {"blind": True} if blind else pictures
            return model.score_sequences(input_ids, ids, attention_mask, **shown).float().cpu()

    batch_size = max(1, min(batch_size, CANDIDATES // len(answers)))
    return torch.stack(_in_batches(processor, latents, texts, batch_size, progress, answer, _can_share(model)))


def caption(
    model: Flamingo,
    processor: FlamingoProcessor,
    latents: Tensor,
    prompts: Sequence[str],
    **how,
) -> list[str]:
    """One caption for each picture of the bank (N, n, d). prompts: what follows <image>, such as a style's cue; may be
    empty. how: see `continue_texts`."""
    texts = [[Chunk(i, prompt)] for i, prompt in enumerate(prompts)]
    return continue_texts(model, processor, latents, texts, **how)
