"""Text and pictures → tensors, and back to text.

What this file teaches: what a Flamingo reads. Every picture is announced by one token, every caption is closed by
another, and between them may stand a *prompt* (a cue, a question) that the model is given rather than asked for:

    <image>{prompt} {caption}<|endofchunk|><image>{prompt} {caption}<|endofchunk|>…
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

MEDIA_TOKEN, EOC_TOKEN = "<image>", "<|endofchunk|>"


@dataclass(frozen=True)
class Chunk:
    """A piece of a text: a picture (its number among the example's pictures, or None), what the model is told, and
    what it should say."""

    picture: int | None
    prompt: str = ""
    caption: str = ""


def add_flamingo_tokens(tokenizer) -> None:
    """Add <|endofchunk|> and <image> (in this order, as open_flamingo does) and see that there is a pad token."""
    tokenizer.add_tokens([EOC_TOKEN, MEDIA_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: padding is told from text by the attention mask


class FlamingoProcessor:
    """A tokenizer with the two added tokens, and the vision encoder's way of preparing a picture.

    Args:
        tokenizer: a Hugging Face tokenizer; `add_flamingo_tokens` has been called on it.
        preprocess: PIL picture → (C, H, W).
    """

    def __init__(self, tokenizer, preprocess: Callable[[Image.Image], Tensor]):
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.media_token_id = tokenizer.convert_tokens_to_ids(MEDIA_TOKEN)
        self.eoc_token_id = tokenizer.convert_tokens_to_ids(EOC_TOKEN)
        self.pad_token_id = tokenizer.pad_token_id
        self.begin_ids = list(tokenizer("").input_ids)  # OPT begins every text with </s>, GPT-2 with nothing

    def preprocess_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """N pictures → (N, F=1, C, H, W)."""
        return torch.stack([self.preprocess(picture) for picture in pictures])[:, None]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode_chunks(self, chunks: Sequence[Chunk], *, open_end: bool = False) -> tuple[list[int], list[bool]]:
        """A text → its token ids, and for each whether the model was *told* it (no loss there).

        open_end: leave the last chunk without caption and <|endofchunk|>, for the model to finish.
        """
        ids, told = list(self.begin_ids), [True] * len(self.begin_ids)
        for i, chunk in enumerate(chunks):
            given = [self.media_token_id] if chunk.picture is not None else []
            given += self._ids(f" {chunk.prompt}") if chunk.prompt else []
            said = self._ids(f" {chunk.caption}") if chunk.caption else []
            if chunk.picture is not None:
                said = [*said, self.eoc_token_id]
            if open_end and i == len(chunks) - 1:
                said = []
            ids += given + said
            told += [True] * len(given) + [False] * len(said)
        return ids, told

    def pad(self, rows: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]:
        """Token ids of unequal length → input_ids and attention_mask (B, T_txt). Left for generation."""
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
            input_ids[i, where] = torch.tensor(row, dtype=torch.long)
            attention_mask[i, where] = 1
        return input_ids, attention_mask

    def decode_captions(self, generated: Tensor, prompt_length: int) -> list[str]:
        """What was generated after the prompt, up to <|endofchunk|>, without special tokens."""
        captions = []
        for row in generated[:, prompt_length:].tolist():
            if self.eoc_token_id in row:
                row = row[: row.index(self.eoc_token_id)]
            captions.append(self.tokenizer.decode(row, skip_special_tokens=True).strip())
        return captions
