"""The classroom scenes as training examples: what `python train.py` learns from when nothing else is named."""

import functools
import random
from typing import NamedTuple

from torch.utils.data import Dataset

from flamingo.classroom import scenes
from flamingo.classroom.invented import invented_names
from flamingo.config import ModelConfig
from flamingo.data.answer_columns import question_prompt
from flamingo.data.batches import Example
from flamingo.data.chunks import Chunk

ONE_WORD_LENGTH = 10  # more than any document has pictures


class Mix(NamedTuple):
    """What the examples of a run are made of.

    documents: their share of the examples. questions: their share of the texts, of documents too. in_a_row: how many
    texts of one scene are set end to end at most (data/joined.py). first_styles: of a curriculum's first part.
    """

    documents: float
    questions: float
    in_a_row: int
    first_styles: tuple[str, str] = ("quiz", "telegram")


# By fusion type. Texts set end to end teach what documents do, to look late in a text, so fewer of them are enough.
# In a stream, where every text would see the pictures of all before it, only documents teach it.
MIXES = {
    "cross-attention": Mix(documents=0.15, questions=0.25, in_a_row=8),
    "language-stream": Mix(documents=0.25, questions=0.2, in_a_row=1),
}


def mix_for(config: ModelConfig) -> Mix:
    """What a model is shown, by the way it joins picture and text. A Q-Former learns names from lists, which are little
    but names, 200 steps before it does from quizzes; no other needs them (assets/classroom/EXPERIMENTS.md)."""
    mix = MIXES[config.fusion_type]
    return mix._replace(first_styles=("list", "telegram")) if config.tokenizer_type == "qformer" else mix


class ClassroomScenes(Dataset):
    """`size` examples, each a pure function of (seed, split, index).

    Most examples have two texts, each in another style: their pictures are encoded and resampled once for both.

    A `curriculum` of two parts comes first. Its first examples are one scene captioned as a quiz (or a list) and as
    a telegram: names, a number, a ground and places, in reading order, and set words between them, so that these are
    learned early; among longer captions they stay unlearned for long, because most of what can be gained at first lies
    elsewhere. Its second part has everything but the two kinds that are looked up in other pictures (below): until the
    model knows what it sees, there is nothing to look up, and these examples only disturb.

    After it there are four kinds, and scenes that say where their things stand (`Example.places`). Most are one scene,
    with captions (nearly always with the cue of their style) or questions about one fact; such texts of a batch are set
    end to end (data/joined.py), so that they do not always stand at the beginning. Some are documents: 2 to 9 scenes
    captioned in one style, which mostly nothing shows but the first captions themselves. Some give things invented
    names and need them again (`naming`), and some answer every picture with one word, by a rule that only the pictures
    show (`one_word`): both can only be looked up in the examples, picture by picture.
    """

    LAYOUTS = (1, 3, 4, 4, 4)  # weights: one thing is learned first, how many there are and what stands where last
    NAMINGS, RULES = 0.2, 0.15  # shares of the examples
    DOCUMENT_LENGTHS = (2, 3, 4, 9)  # scenes; drawn from: as many as an evaluation shows at most

    skipped: tuple[str, ...] = ()  # nothing is ever broken here

    def __init__(
        self, split: str, seed: int = 0, size: int = 100_000, curriculum: tuple[int, int] = (0, 0),
        mix: Mix = MIXES["cross-attention"],
    ):  # fmt: skip
        self.split, self.seed, self.size, self.curriculum, self.mix = split, seed, size, curriculum, mix

    def __len__(self) -> int:
        return self.size

    def length(self, index: int) -> int:
        """Pictures of its texts: documents are batched apart, but all styles and layouts share a batch. (Batches of
        equally many tokens would each be of one layout and one style, and pull the weights to and fro.) Examples of one
        word are batched by themselves, for beside whole captions their few tokens would hardly count."""
        drawn, texts = self._plan(index)
        return ONE_WORD_LENGTH if texts[0][0].prompt == scenes.ONE_WORD else len(drawn)

    def __getitem__(self, index: int) -> Example:
        drawn, texts = self._plan(index)
        places = [(k, *pair) for k, scene in enumerate(drawn) for pair in scene.places()]
        return Example([scene.draw() for scene in drawn], texts, places=places if index >= sum(self.curriculum) else ())

    def texts(self, index: int) -> list[list[Chunk]]:
        """The texts of an example, without its pictures."""
        return self._plan(index)[1]

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (the sampler asks for a window's lengths, then for its examples)
    def _plan(self, index: int) -> tuple[list[scenes.Scene], list[list[Chunk]]]:
        """The scenes of an example and the texts about them."""
        rng = random.Random(f"example {self.seed} {self.split} {index}")

        def scenes_of(count: int) -> list[scenes.Scene]:
            layouts = rng.choices(scenes.LAYOUTS, self.LAYOUTS, k=count)
            return [scenes.make_scene(self.seed, self.split, rng.randrange(2**40), layout=each) for each in layouts]

        lists, captions = self.curriculum
        if index < lists:
            drawn = scenes_of(1)
            return drawn, [caption_scenes(drawn, style, with_cue=True) for style in self.mix.first_styles]
        kind = rng.uniform(0 if index >= lists + captions else self.NAMINGS + self.RULES, 1)
        if kind < self.NAMINGS:
            return naming(rng, self.split)
        if kind < self.NAMINGS + self.RULES:
            return one_word(rng, self.seed, self.split)
        document = kind < self.NAMINGS + self.RULES + self.mix.documents
        drawn = scenes_of(rng.choice(self.DOCUMENT_LENGTHS) if document else 1)
        texts = []
        for style in rng.sample(scenes.STYLES, 2):
            if rng.random() < self.mix.questions:
                texts.append([question_chunk(k, scene, rng) for k, scene in enumerate(drawn)])
            else:
                texts.append(caption_scenes(drawn, style, with_cue=rng.random() < (0.2 if document else 0.9)))
        return drawn, texts


def caption_scenes(drawn: list[scenes.Scene], style: str, with_cue: bool) -> list[Chunk]:
    """One text about the scenes, in one style throughout."""
    cue = scenes.CUES[style] if with_cue else ""
    return [Chunk(k, cue, scene.caption(style)) for k, scene in enumerate(drawn)]


def question_chunk(picture: int, scene: scenes.Scene, rng: random.Random) -> Chunk:
    """One question about the scene, as the prompt, and its answer."""
    question, answer = rng.choice(scene.questions())
    return Chunk(picture, question_prompt(question), answer)


def naming(rng: random.Random, split: str) -> tuple[list[scenes.Scene], list[list[Chunk]]]:
    """Two to five things are given invented names, then shown again, otherwise drawn: what are they called?"""
    count = rng.choice((2, 2, 3, 5))
    things = rng.sample(scenes.objects_of(split), count)
    names = dict(zip(things, invented_names(rng, count), strict=True))
    shown = [*things, *(rng.choice(things) for _ in range(3))]
    drawn = [scenes.one_of(rng, thing) for thing in shown]
    # The first name of each is a prompt, without loss: nobody could guess it.
    chunks = [Chunk(k, names[thing], "") if k < count else Chunk(k, "", names[thing]) for k, thing in enumerate(shown)]
    return drawn, [chunks]


def rule_chunk(picture: int, scene: scenes.Scene, rule: str) -> Chunk:
    """The one word about a scene by a rule of `scenes.RULES`. Its prompt is the same for all rules."""
    return Chunk(picture, scenes.ONE_WORD, scene.by_rule(rule))


def one_word(rng: random.Random, seed: int, split: str) -> tuple[list[scenes.Scene], list[list[Chunk]]]:
    """Three to nine scenes, each answered by one word, all by one rule: which, only the examples' pictures show."""
    rule = rng.choice((*scenes.RULES, "left", "right"))  # twice as often as the two that the words alone tell
    layouts = rng.choices(scenes.RULE_LAYOUTS, k=rng.choice((3, 4, 5, 6, 9)))
    drawn = [scenes.make_scene(seed, split, rng.randrange(2**40), layout=layout) for layout in layouts]
    return drawn, [[rule_chunk(k, scene, rule) for k, scene in enumerate(drawn)]]
