"""Two tests on classroom pictures of one object: which of these is it, and can a name be learned from one showing?

What this file teaches: *fast binding*. Two examples give invented names to two drawn things, and a third picture shows
one of them again, elsewhere, at another size, on another ground:

    <image> zuki<|endofchunk|><image> tavo<|endofchunk|><image>        zuki or tavo?

The names mean nothing before and the order gives no hint, so only a model that compares the third picture with the
first two can know; all others are right half of the time, with five examples a fifth of it. (The Open-Ended
MiniImageNet task of Tsimpoukelli et al. 2021, "Frozen".) The prediction is the likeliest of the names shown, its
<|endofchunk|> included.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flamingo.classroom import scenes
from flamingo.classroom.invented import invented_names
from flamingo.data.answer_columns import question_prompt
from flamingo.data.chunks import Chunk
from flamingo.evaluation.few_shot import Query, Task, prompt_text
from flamingo.evaluation.metrics import bootstrap_interval
from flamingo.evaluation.parts import Parts
from flamingo.evaluation.predictor import Predictor

# ------------------------------------------------------------------------------------------------- pictures
SEARCHED = 20_000  # scenes, at most
EXAMPLES = 3  # scenes of a name that classification keeps for examples
NAMES_OF_EPISODES = 6  # invented names that fast binding draws from
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
    """Shown pictures (rows of the bank) with their invented names, the query picture, and which of them it is."""

    shown: tuple[int, ...]
    names: tuple[str, ...]
    asked: int
    right: int

    def text(self, way: str = "") -> list[Chunk]:
        examples = [Chunk(row, "", name) for row, name in zip(self.shown, self.names, strict=True)]
        return prompt_text(Query(self.asked, "", []), examples, way)


def names_of_episodes(seed: int) -> list[str]:
    """The invented names that episodes draw from, none of which any training has read."""
    return invented_names(random.Random(f"binding {seed}"), NAMES_OF_EPISODES, held_out=True)


def binding_episodes(singles: Singles, n: int, seed: int, ways: int = 2) -> list[Episode]:
    """n episodes of `ways` objects each; the objects, their names, their order and which is the query are drawn at
    random."""
    pool, episodes = names_of_episodes(seed), []
    for i in range(n):
        rng = random.Random(f"binding {seed} {ways} {i}")
        objects, names, right = rng.sample(sorted(singles), ways), rng.sample(pool, ways), rng.randrange(ways)
        asked, scene = rng.choice(singles[objects[right]])
        # All are shown on other grounds than the query's: the ground gives no hint.
        others = [[row for row, other in singles[name] if other.ground != scene.ground] for name in objects]
        episodes.append(Episode(tuple(map(rng.choice, others)), tuple(names), asked, right))
    return episodes


def binding_marks(
    predictor: Predictor, parts: Parts, episodes: Sequence[Episode], title: str, seed: int, way: str = ""
) -> np.ndarray:
    """1.0 where the likeliest of the names shown is right, (N,). way: a control, see `Episode.text`, or blind."""
    pool = names_of_episodes(seed)
    columns = [[pool.index(name) for name in episode.names] for episode in episodes]
    texts = [episode.text("" if way == "blind" else way) for episode in episodes]

    def work() -> list[bool]:
        scores = predictor.choose(texts, pool, title, blind=way == "blind")  # (B, K)
        return [scores[b, columns[b]].argmax().item() == episode.right for b, episode in enumerate(episodes)]

    return np.array(parts.keep(title, work), dtype=float)


def fast_binding(
    predictor: Predictor, parts: Parts, episodes: Sequence[Episode], title: str, seed: int, controls: bool = True
) -> dict:
    """{accuracy, low, high, n, chance}, and with controls blind, text_only_demos: all pictures taken away, and those of
    the examples; both are at chance."""
    right = binding_marks(predictor, parts, episodes, title, seed)
    low, high = bootstrap_interval(right)
    result = {"accuracy": float(right.mean()), "low": float(low), "high": float(high), "n": len(right)}
    for way in ("blind", "text_only_demos") if controls else ():
        result[way] = float(binding_marks(predictor, parts, episodes, f"{title}, {way}", seed, way).mean())
    return result | {"chance": 1 / len(episodes[0].shown)}


def binding_sentence(bound: dict) -> str:
    """Fast binding, two ways and five, beside its controls."""

    def cell(held: dict) -> str:
        return (
            f"{held['accuracy']:.3f} [{held['low']:.3f}, {held['high']:.3f}], novel {held['novel']['accuracy']:.3f} "
            f"(blind {held['blind']:.3f}, text only {held['text_only_demos']:.3f}, chance {held['chance']:.2f})"
        )

    return f"fast binding, n = {bound['n']}: of two {cell(bound)}; of five {cell(bound['five_way'])}"
