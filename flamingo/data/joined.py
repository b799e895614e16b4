"""Texts about one picture each, set end to end into longer ones.

What this file teaches: a look asks with what the language model makes of the text so far. Most texts of a captioned set
are one picture and its caption, so nearly all looks are learned a few tokens after a beginning. Behind eight examples a
frozen language model makes something else of the same question, and the look finds another thing of the same picture.
Texts that stand behind others teach it for any place, and cost nothing: the same tokens of the same pictures, and every
caption still sees its own picture alone.

    <image> As a list: blue: cat<|endofchunk|>     <image> As a list: blue: cat<|endofchunk|><image> As a list: red: …
    <image> As a quiz: what? a …               →   <image> As a quiz: what? a …
    <image> As a list: red: dog<|endofchunk|>
"""

import random
from collections.abc import Sequence

from flamingo.data.chunks import Chunk

Encoded = tuple[list[int], list[bool]]  # token ids, and for each whether it is given (processor.encode_texts)


def can_be_joined(texts: Sequence[Sequence[Chunk]]) -> bool:
    """Is each of one picture?"""
    return all(len(text) == 1 and text[0].picture is not None for text in texts)


def join_texts(
    texts: Sequence[Sequence[Chunk]], encoded: Sequence[Encoded], rows: Sequence[Sequence[int]], begin: int, most: int,
    room: int,
) -> tuple[Sequence[Encoded], Sequence[Sequence[int]]]:  # fmt: skip
    """Texts and their pictures (rows of the bank) → fewer and longer ones.

    How many stand in a row is drawn from 1 to `most`, the same for all, so that little is padded; fewer where `room`
    tokens hold no more. Those whose prompts begin alike, up to a colon (the same cue, or all of them questions), follow
    one another: each is an example for the next. begin: tokens that begin a text (</s>).
    """
    rng = random.Random(repr(texts[0]))  # by what they say, so that a resumed run joins the same
    count = rng.randint(1, most)
    if count == 1:
        return encoded, rows
    order = sorted(range(len(texts)), key=lambda i: (texts[i][0].prompt.partition(":")[0], rng.random()))
    joined: list[Encoded] = []
    joined_rows: list[list[int]] = []
    for i in order:
        ids, is_prompt = encoded[i]
        if joined and len(joined_rows[-1]) < count and len(joined[-1][0]) + len(ids) - begin <= room:
            joined[-1][0].extend(ids[begin:])
            joined[-1][1].extend(is_prompt[begin:])
            joined_rows[-1].extend(rows[i])
        else:
            joined.append((list(ids), list(is_prompt)))
            joined_rows.append(list(rows[i]))
    return joined, joined_rows
