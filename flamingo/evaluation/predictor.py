"""The model under evaluation: it holds one bank of pictures and makes predictions about them.

What this file teaches: an evaluation needs the same pictures again and again (with a cue, without, as an example for
others). So all pictures are put into one bank first; it is encoded once, when the first prediction is needed.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from flamingo.data.chunks import Chunk
from flamingo.data.processor import FlamingoProcessor
from flamingo.errors import InputError
from flamingo.evaluation import captioning
from flamingo.evaluation.test_set import Item
from flamingo.fast.precision import autocast
from flamingo.interop import compat
from flamingo.model.vlm import Flamingo


class Predictor:
    """dtype: precision of the run, float32 or bfloat16. decoding: how captions are chosen; seed: of candidates."""

    def __init__(
        self, model: Flamingo, processor: FlamingoProcessor, dtype: str = "float32",
        decoding: captioning.Decoding = captioning.GREEDY, seed: int = 0,
    ):  # fmt: skip
        self.model, self.processor, self.dtype, self.decoding, self.seed = model, processor, dtype, decoding, seed
        self.device = next(model.vision_tokenizer.parameters()).device
        self.pictures: list[captioning.Picture] = []

    def add(self, pictures: Sequence[captioning.Picture]) -> list[int]:
        """Put pictures, or what opens them, into the bank → their rows. Raises RuntimeError once it is encoded."""
        if "_encoded" in self.__dict__:
            raise RuntimeError("the bank is encoded already: add all pictures first")
        first = len(self.pictures)
        self.pictures += pictures
        return list(range(first, len(self.pictures)))

    def autocast(self):
        return autocast(self.device, self.dtype)

    @cached_property
    def _encoded(self) -> tuple[Tensor, Tensor]:
        return captioning.encode_and_pool(
            self.model, self.processor, self.pictures, autocast=self.autocast, progress="encoding pictures"
        )

    @property
    def latents(self) -> Tensor:
        """(N, n, d) the bank."""
        return self._encoded[0]

    @property
    def pooled(self) -> Tensor:
        """(N, d) a unit vector for each picture: the mean of its patch features."""
        return self._encoded[1]

    def predict(self, texts: Sequence[Sequence[Chunk]], title: str, *, blind: bool = False) -> list[str]:
        """What the model generates at the end of each text; `Chunk.picture` are rows of the bank."""
        torch.manual_seed(self.seed)  # so that a part gives the same whether others were done before it or kept
        return captioning.continue_texts(
            self.model, self.processor, self.latents, texts, blind=blind, autocast=self.autocast, progress=title,
            decoding=self.decoding,
        )  # fmt: skip

    def draw(self, texts: Sequence[Sequence[Chunk]], count: int, temperature: float, title: str) -> list[list[str]]:
        """`count` continuations of each text, drawn at random by seed."""
        torch.manual_seed(self.seed)
        return captioning.draw_texts(
            self.model, self.processor, self.latents, texts, count, temperature=temperature, autocast=self.autocast,
            progress=title,
        )  # fmt: skip

    def caption(self, rows: Sequence[int], items: Sequence[Item], title: str, *, blind: bool = False) -> list[str]:
        """What the model generates after each item's prompt, beside the picture of the bank in the same place of
        `rows`: its own, or as a control another's."""
        texts = [[Chunk(row, item.prompt)] for row, item in zip(rows, items, strict=True)]
        return self.predict(texts, title, blind=blind)

    def choose(
        self, texts: Sequence[Sequence[Chunk]], answers: Sequence[str], title: str | None, *, blind: bool = False
    ) -> Tensor:
        """Log-likelihood of each answer at the end of each text, (B, K)."""
        return captioning.score_answers(
            self.model, self.processor, self.latents, texts, answers, blind=blind, autocast=self.autocast,
            progress=title,
        )  # fmt: skip

    def length(self, chunk: Chunk) -> int:
        """Places that a finished chunk takes: its tokens, and those of its picture if it stands among them."""
        picture = 0 if chunk.picture is None else self.model.tokens_per_image
        return picture + len(self.processor.encode_chunks([chunk])[0]) - len(self.processor.begin_ids)

    def check_room(self, shots: int, examples: Sequence[Chunk], queries: Sequence[Chunk]) -> None:
        """Raises InputError, naming the number that fits, if the longest examples could leave no room to generate."""
        positions = compat.max_positions(self.model.lang_encoder.config)
        if positions is None:
            return
        room = positions - captioning.NEW_TOKENS - len(self.processor.begin_ids) - max(map(self.length, queries))
        fit = 0
        for length in sorted(map(self.length, examples), reverse=True):
            room -= length
            if room < 0:
                break
            fit += 1
        if shots > fit:
            raise InputError(
                f"--shots {shots} does not fit: the language model has {positions} positions, "
                f"enough for {fit} of these examples; ask for at most {fit} shots"
            )
