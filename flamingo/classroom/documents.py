"""What the classroom's language model reads: documents of captions, without any picture.

What this file teaches: what a language model has to have read for Flamingo to learn from examples. Documents keep one
caption style throughout and mostly do not name it, so the model follows its context.
"""

import random

from flamingo.classroom import scenes
from flamingo.classroom.invented import invented_names

NAMINGS, ONE_WORD, ONE_SCENE = 0.2, 0.05, 0.28  # shares of the documents


def chunk(scene: scenes.Scene, style: str, rng: random.Random, with_cue: bool) -> str:
    """One caption as it stands in a document: a space, perhaps a cue, the caption."""
    if style == "answer":  # a question is its own cue
        question, answer = rng.choice(scene.questions())
        return f" Question: {question} Answer: {answer}"
    cue = f" {scenes.CUES[style]}" if with_cue else ""
    return f"{cue} {scene.caption(style)}"


def document(seed: int, split: str, index: int, *, include_novel: bool, namings: bool = True) -> str:
    """Four kinds of document, a line for each caption.

    Half caption 1 to 16 scenes in one style throughout; three in ten of these name it with a cue. A third caption *one*
    scene in several styles, with questions: there the next token can be known from the lines before, so the model
    learns to be sure of a name. (A model that has only ever guessed names cannot predict one with confidence, whatever
    it is shown.) Some give invented names to things and use them again, in another order: only a model that looks them
    up can know the next one. And a few have one word a line, of one kind throughout.

    namings: with invented names (for all but the tokenizer).
    """
    rng = random.Random(f"document {seed} {split} {index}")
    first = rng.randrange(2**40)
    kind = rng.uniform(0 if namings else NAMINGS, 1)
    if kind < NAMINGS:
        return "\n".join(naming_lines(rng, held_out=split != "train"))
    if kind < NAMINGS + ONE_WORD:
        return "\n".join(one_word_lines(rng))
    if kind < NAMINGS + ONE_WORD + ONE_SCENE:
        drawn = [
            scenes.make_scene(seed, split, first + k, include_novel=include_novel) for k in range(rng.randint(1, 4))
        ]
        return "\n".join(line for scene in drawn for line in _in_several_styles(scene, rng))
    style = rng.choice((*scenes.STYLES, "answer"))
    with_cue = rng.random() < 0.3
    drawn = [scenes.make_scene(seed, split, first + k, include_novel=include_novel) for k in range(rng.randint(1, 16))]
    return "\n".join(chunk(scene, style, rng, with_cue) for scene in drawn)


def document_row(
    tokenizer, seed: int, split: str, first: int, length: int, *, include_novel: bool
) -> tuple[list[int], int]:
    """`length` token ids: document number `first` and those behind it, the last one cut; and the number of the next."""
    row: list[int] = []
    while len(row) < length:
        row += tokenizer(document(seed, split, first, include_novel=include_novel)).input_ids
        first += 1
    return row[:length], first


def _in_several_styles(scene: scenes.Scene, rng: random.Random) -> list[str]:
    """One scene in several styles, each named by its cue, and questions about it."""
    styles = rng.sample((*scenes.STYLES, "answer", "answer"), rng.randint(3, 6))
    return [chunk(scene, style, rng, with_cue=True) for style in styles]


def naming_lines(rng: random.Random, *, held_out: bool = False) -> list[str]:
    """` dog zuki`, ` cat tavo`, …: 2 to 5 things with invented names, each given two to four times."""
    how_many = rng.randint(2, 5)
    things, names = rng.sample(scenes.OBJECTS, how_many), invented_names(rng, how_many, held_out=held_out)
    lines = [f" {thing} {name}" for thing, name in zip(things, names, strict=True)]
    return [line for _ in range(rng.randint(2, 4)) for line in rng.sample(lines, how_many)]


def one_word_lines(rng: random.Random) -> list[str]:
    """` In a word: dog`, ` In a word: bear`, …: things, grounds or counts throughout."""
    words = rng.choice((scenes.OBJECTS, tuple(scenes.GROUNDS), scenes.COUNTS))
    return [f" {scenes.ONE_WORD} {rng.choice(words)}" for _ in range(rng.randint(2, 10))]
