"""The classroom scenes as training examples: what `python train.py` learns from when nothing else is named."""

import random

from torch.utils.data import Dataset

from flamingo.data import scenes
from flamingo.data.batches import Example
from flamingo.processor import Chunk


def cue_of(style: str) -> str:
    return scenes.CUES[style]


class ClassroomScenes(Dataset):
    """Endless in practice: `size` examples, each a pure function of (seed, split, index).

    Two in three examples are one scene with three texts: two captions in different styles (nearly always with
    their cue) and one question about a place, the ground or a number. Questions put the whole loss on one fact and so
    teach early *where* things are. One in three is a document: 2 to 4 scenes told in one style, which nothing names
    but the first captions themselves.
    """

    def __init__(self, split: str, seed: int = 0, size: int = 100_000):
        self.split, self.seed, self.size = split, seed, size

    def __len__(self) -> int:
        return self.size

    def length(self, index: int) -> int:
        """How many captions follow each other in the texts of this example."""
        return self._begin(index)[1]

    def _begin(self, index: int) -> tuple[random.Random, int]:
        rng = random.Random(f"example {self.seed} {self.split} {index}")
        return rng, rng.choice((1, 1, 1, 1, 1, 1, 2, 3, 4))

    def __getitem__(self, index: int) -> Example:
        rng, told = self._begin(index)
        if told > 1:
            return self._document(rng, told)
        scene = scenes.make_scene(self.seed, self.split, rng.randrange(2**40))
        texts = []
        for style in rng.sample(scenes.STYLES, 2):
            cue = cue_of(style) if rng.random() < 0.9 else ""
            texts.append([Chunk(0, cue, scene.caption(style))])
        texts.append([question_chunk(scene, rng)])
        return Example([scene.draw()], texts)

    def _document(self, rng: random.Random, how_many: int) -> Example:
        style = rng.choice(scenes.STYLES)
        cue = cue_of(style) if rng.random() < 0.2 else ""
        told = [scenes.make_scene(self.seed, self.split, rng.randrange(2**40)) for _ in range(how_many)]
        chunks = [Chunk(k, cue, scene.caption(style)) for k, scene in enumerate(told)]
        return Example([scene.draw() for scene in told], [chunks])


def question_chunk(scene: scenes.Scene, rng: random.Random) -> Chunk:
    """One question about the scene, as the prompt, and its answer."""
    question, answer = rng.choice(scene.questions())
    return Chunk(0, f"Question: {question} Answer:", answer)
