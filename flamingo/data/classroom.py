"""The classroom scenes as training examples: what `python train.py` learns from when nothing else is named."""

import random

from torch.utils.data import Dataset

from flamingo.data import scenes
from flamingo.data.batches import Example
from flamingo.data.questions import question_prompt
from flamingo.processor import Chunk


class ClassroomScenes(Dataset):
    """`size` examples, each a pure function of (seed, split, index).

    The first `first_lessons` are *first words*: one scene told as a list, or as a telegram. Nearly every word of these
    is a name, a ground or a place, in reading order, so that names and places bind early; among longer captions they
    stay unlearned for long, because most of what can be gained at first lies elsewhere.

    After them there are three kinds. Most are one scene with a caption in some style (nearly always with its cue) or a
    question about one fact. Some are documents: 2 to 4 scenes told in one style, which mostly nothing
    names but the first captions themselves. And some give two things invented names and ask for them again: what they
    are called can only be looked up in the examples.
    """

    LAYOUTS = (1, 3, 2, 2, 2)  # weights: whether two things are the same is learned last, one thing alone first
    FIRST_STYLES = ("list", "list", "telegram")
    DOCUMENTS, NAMINGS, QUESTIONS = 0.15, 0.03, 0.12  # shares

    skipped: tuple[str, ...] = ()  # nothing is ever broken here

    def __init__(self, split: str, seed: int = 0, size: int = 100_000, first_lessons: int = 0):
        self.split, self.seed, self.size, self.first_lessons = split, seed, size, first_lessons

    def __len__(self) -> int:
        return self.size

    def length(self, index: int) -> int:
        """Words of the longest text, in steps of 32: documents keep to themselves, but all styles and layouts share a
        batch. (Batches of one layout each, as exact lengths would make them, pull the weights to and fro.)"""
        return max(sum(len(f"{c.prompt} {c.caption}".split()) for c in text) for text in self._plan(index)[1]) // 32

    def __getitem__(self, index: int) -> Example:
        told, texts = self._plan(index)
        return Example([scene.draw() for scene in told], texts)

    def _plan(self, index: int) -> tuple[list[scenes.Scene], list[list[Chunk]]]:
        """The scenes of an example and the texts about them."""
        rng = random.Random(f"example {self.seed} {self.split} {index}")
        layouts = iter(rng.choices(scenes.LAYOUTS, self.LAYOUTS, k=4))

        def scene() -> scenes.Scene:
            return scenes.make_scene(self.seed, self.split, rng.randrange(2**40), layout=next(layouts))

        if index < self.first_lessons:
            told = scene()
            style = rng.choice(self.FIRST_STYLES)
            return [told], [[Chunk(0, scenes.CUES[style], told.caption(style))]]
        kind = rng.random()
        if kind < self.NAMINGS:
            return naming(rng, self.split)
        if kind < self.NAMINGS + self.DOCUMENTS:
            told = [scene() for _ in range(rng.randint(2, 4))]
            style = rng.choice(scenes.STYLES)
            cue = scenes.CUES[style] if rng.random() < 0.2 else ""
            return told, [[Chunk(k, cue, each.caption(style)) for k, each in enumerate(told)]]
        told = scene()
        if kind > 1 - self.QUESTIONS:
            return [told], [[question_chunk(told, rng)]]
        style = rng.choice(scenes.STYLES)
        cue = scenes.CUES[style] if rng.random() < 0.9 else ""
        return [told], [[Chunk(0, cue, told.caption(style))]]


def question_chunk(scene: scenes.Scene, rng: random.Random) -> Chunk:
    """One question about the scene, as the prompt, and its answer."""
    question, answer = rng.choice(scene.questions())
    return Chunk(0, question_prompt(question), answer)


def naming(rng: random.Random, split: str) -> tuple[list[scenes.Scene], list[list[Chunk]]]:
    """Two things are given invented names, then shown again, otherwise drawn: what are they called?"""
    things = rng.sample(scenes.objects_of(split), 2)
    words = dict(zip(things, rng.sample(scenes.INVENTED, 2), strict=True))
    shown = [*things, *(rng.choice(things) for _ in range(2))]
    told = [scenes.one_of(rng, thing) for thing in shown]
    # The first showing of each is told: nobody could guess the name.
    chunks = [Chunk(k, words[thing], "") if k < 2 else Chunk(k, "", words[thing]) for k, thing in enumerate(shown)]
    return told, [chunks]
