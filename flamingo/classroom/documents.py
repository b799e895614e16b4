"""What the classroom's language model reads: documents of captions, without any picture.

What this file teaches: what a language model has to have read for Flamingo to learn from examples. Documents keep one
caption style throughout and mostly do not name it, so the model follows its context.
"""

import random

from flamingo.classroom import scenes


def chunk(scene: scenes.Scene, style: str, rng: random.Random, with_cue: bool) -> str:
    """One caption as it stands in a document: a space, perhaps a cue, the caption."""
    if style == "answer":  # a question is its own cue
        question, answer = rng.choice(scene.questions())
        return f" Question: {question} Answer: {answer}"
    cue = f" {scenes.CUES[style]}" if with_cue else ""
    return f"{cue} {scene.caption(style)}"


def document(seed: int, split: str, index: int, *, include_novel: bool) -> str:
    """Three kinds of document, a line for each caption.

    More than half caption 1 to 16 scenes in one style throughout; three in ten of these name it with a cue. A third
    caption *one* scene in several styles, with questions: there the next token can be known from the lines before, so
    the model learns to be sure of a name. (A model that has only ever guessed names cannot predict one with
    confidence, whatever it is shown.) The rest give invented names to things and use them again.
    """
    rng = random.Random(f"document {seed} {split} {index}")
    first = rng.randrange(2**40)
    kind = rng.random()
    if kind < 0.1:
        return "\n".join(naming_lines(rng))
    if kind < 0.43:
        drawn = [
            scenes.make_scene(seed, split, first + k, include_novel=include_novel) for k in range(rng.randint(1, 4))
        ]
        return "\n".join(line for scene in drawn for line in _in_several_styles(scene, rng))
    style = rng.choice((*scenes.STYLES, "answer"))
    with_cue = rng.random() < 0.3
    drawn = [scenes.make_scene(seed, split, first + k, include_novel=include_novel) for k in range(rng.randint(1, 16))]
    return "\n".join(chunk(scene, style, rng, with_cue) for scene in drawn)


def _in_several_styles(scene: scenes.Scene, rng: random.Random) -> list[str]:
    """One scene in several styles, each named by its cue, and questions about it."""
    styles = rng.sample((*scenes.STYLES, "answer", "answer"), rng.randint(3, 6))
    return [chunk(scene, style, rng, with_cue=True) for style in styles]


def naming_lines(rng: random.Random) -> list[str]:
    """` dog dax`, ` cat wug`, …: 2 to 5 things with invented names, each given two or three times."""
    how_many = rng.randint(2, 5)
    things, words = rng.sample(scenes.OBJECTS, how_many), rng.sample(scenes.INVENTED, how_many)
    lines = [f" {thing} {word}" for thing, word in zip(things, words, strict=True)]
    return [line for _ in range(rng.randint(2, 3)) for line in rng.sample(lines, how_many)]
