"""What the page is told about a model: plain values, so that they can come from another process (remote.py).

(Imports nothing heavy: the page's process has no PyTorch.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

Gates = Sequence[tuple[float | None, float | None]] | None  # tanh of (attention, feed-forward); None: as trained


@dataclass(frozen=True)
class About:
    """What a model is, by which the tabs are built.

    run: its folder. trained: tanh of both gates, a pair for each layer that looks. layers: numbers of the decoder
    layers that a cross-attention stands before. heads: of a cross-attention. can_show_attention: do resampler and
    cross-attention lie between patch and word? has_media_mask: does a mask say which token sees which picture?
    """

    run: Path
    trained: list[tuple[float, float]]
    layers: list[int]
    heads: int
    can_show_attention: bool
    has_media_mask: bool


@dataclass(frozen=True)
class Step:
    """A token of a caption: its probability, and the likeliest tokens at that place with theirs."""

    token: str
    probability: float
    likeliest: list[tuple[str, float]]


@dataclass(frozen=True)
class Look:
    """words: of a caption. word: the number of one of them, None if there is none. picture: lit where the model looked
    when it generated that word."""

    words: list[str]
    word: int | None
    picture: Image.Image


@dataclass(frozen=True)
class Seen:
    """tokens: of a text. mask: (T_txt, T_img), may this token look at this picture?"""

    tokens: list[str]
    mask: list[list[bool]]
