"""Two tests on classroom pictures of one object: which of these is it, and can a name be learned from one showing?

What this file teaches: *fast binding*. Two examples give made-up names to two drawn things, and a third picture shows
one of them again, elsewhere, at another size, on another ground:

    <image> dax<|endofchunk|><image> wug<|endofchunk|><image>        dax or wug?

The names mean nothing before and the order gives no hint, so only a model that compares the third picture with the
first two can know; all others are right half of the time. (The Open-Ended MiniImageNet task of Tsimpoukelli et al.
2021, "Frozen".) The prediction is the likelier of the two names, its <|endofchunk|> included.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flamingo.classroom import scenes
from flamingo.data.answer_columns import question_prompt
from flamingo.data.processor import Chunk
from flamingo.evaluation.few_shot import Query, Task
from flamingo.evaluation.metrics import bootstrap_interval
from flamingo.evaluation.parts import Parts
from flamingo.evaluation.predictor import Predictor

# ------------------------------------------------------------------------------------------------- pictures
SEARCHED = 20_000  # scenes, at most
EXAMPLES = 3  # scenes of a name that classification keeps for examples
Singles = dict[str, list[tuple[int, scenes.Scene]]]  # name → (row of the bank, scene), each with another ground


def add_single_objects(predictor: Predictor, split: str, seed: int, most_names: int, each: int) -> Singles:
    """Put scenes of one object into the bank: up to `most_names` names, `each` of a name, all on different grounds."""
    found: dict[str, dict[str, scenes.Scene]] = {}  # name → ground → scene
    whole: list[str] = []
    for i in range(SEARCHED):
        scene = scenes.make_scene(seed, split, 2**41 + i)
        if scene.layout == "one" and scene.names[0] not in whole:
            grounds = found.setdefault(scene.names[0], {})
            grounds.setdefault(scene.ground, scene)
            whole += [scene.names[0]] if len(grounds) == each else []
        if len(whole) == most_names:
            break
    rows = iter(predictor.add([scene.draw() for name in whole for scene in found[name].values()]))
    return {name: [(next(rows), scene) for scene in found[name].values()] for name in whole}


# ------------------------------------------------------------------------------------------- classification
def classification_task(name: str, singles: Singles, n: int) -> Task:
    """Which of these objects is it? The first scenes of each name are for examples, the others are queries."""

    def ask(row: int, scene: scenes.Scene) -> Chunk:
        answer = scenes.with_article(scene.names[0])
        question = next(question for question, right in scene.questions() if right == answer)
        return Chunk(row, question_prompt(question), answer)

    support = {row: scene for pairs in singles.values() for row, scene in pairs[:EXAMPLES]}
    turns = zip(
        *(pairs[EXAMPLES:] for pairs in singles.values()), strict=True
    )  # every name once, then every name again
    asked = [ask(row, scene) for turn in turns for row, scene in turn][:n]
    queries = [Query(chunk.picture, chunk.prompt, [chunk.caption]) for chunk in asked]
    answers = [scenes.with_article(name) for name in singles]
    return Task(
        name, queries, list(support), lambda row, query: ask(row, support[row]), answers, chance=1 / len(answers)
    )


# --------------------------------------------------------------------------------------------- fast binding
@dataclass(frozen=True)
class Episode:
    """Two shown pictures (rows of the bank) with their made-up names, the query picture, and which of the two it is."""

    shown: tuple[int, int]
    names: tuple[str, str]
    asked: int
    right: int

    def text(self) -> list[Chunk]:
        examples = [Chunk(row, "", name) for row, name in zip(self.shown, self.names, strict=True)]
        return [*examples, Chunk(self.asked)]


def binding_episodes(singles: Singles, n: int, seed: int) -> list[Episode]:
    """n episodes; the two objects, their names, their order and which is the query are drawn at random."""
    episodes = []
    for i in range(n):
        rng = random.Random(f"binding {seed} {i}")
        objects, names, right = rng.sample(sorted(singles), 2), rng.sample(scenes.INVENTED, 2), rng.randrange(2)
        shown = [rng.choice(singles[name]) for name in objects]
        grounds = {scene.ground for _, scene in shown}
        # Another scene of the same object, on neither of the grounds shown: the ground gives no hint.
        asked = rng.choice([pair for pair in singles[objects[right]] if pair[1].ground not in grounds])
        episodes.append(Episode((shown[0][0], shown[1][0]), tuple(names), asked[0], right))
    return episodes


def fast_binding(predictor: Predictor, parts: Parts, episodes: Sequence[Episode], title: str) -> dict:
    """{accuracy, low, high, n, chance}."""

    def work() -> list[bool]:
        scores = predictor.choose([episode.text() for episode in episodes], scenes.INVENTED, title)  # (B, K)
        columns = [[scenes.INVENTED.index(name) for name in episode.names] for episode in episodes]
        return [scores[b, columns[b]].argmax().item() == episode.right for b, episode in enumerate(episodes)]

    marks = np.array(parts.keep(title, work), dtype=float)
    low, high = bootstrap_interval(marks)
    return {"accuracy": float(marks.mean()), "low": float(low), "high": float(high), "n": len(marks), "chance": 0.5}
