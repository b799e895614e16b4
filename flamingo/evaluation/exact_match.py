"""Exact match with its controls.

What this file teaches: a score alone does not say that a model looks at its picture. The same prompts are answered
three times: with the right picture, with none (blind), and with another one's (shuffled).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from flamingo.captioning import caption, encode_pictures
from flamingo.data import scenes
from flamingo.data.sources import captioned_splits
from flamingo.errors import InputError
from flamingo.evaluation.metrics import normalise
from flamingo.modeling import Flamingo
from flamingo.options import TrainingOptions
from flamingo.processor import FlamingoProcessor
from flamingo.training import autocast


@dataclass(frozen=True)
class Item:
    """One question of the exam: a picture, what the model is told, the captions that are right, and its group."""

    picture: Image.Image
    prompt: str
    truths: Sequence[str]
    group: str


def classroom_items(split: str, n: int, seed: int) -> list[Item]:
    """n scenes of a split; the style goes round and is named by its cue. Grouped by number of objects.

    (The seed is kept apart from those of training, whose scenes come from other splits in any case.)
    """
    items = []
    for i in range(n):
        scene = scenes.make_scene(seed, split, i)
        style = scenes.STYLES[i % len(scenes.STYLES)]
        items.append(Item(scene.draw(), scenes.CUES[style], [scene.caption(style)], str(len(scene.objects))))
    return items


def set_items(options: TrainingOptions, n: int) -> list[Item]:
    """The test split of a captioned set (its validation split if it has none), at most n pictures."""
    splits = captioned_splits(options)
    examples = splits.get("test") or splits["validation"]
    items = []
    for i in range(min(n, len(examples))):
        example = examples[i]
        truths = [chunk.caption for text in example.texts for chunk in text if chunk.picture == 0]
        items.append(Item(example.pictures[0], "", truths, str(len(example.pictures))))
    if len(items) < 2:
        raise InputError(f"{options.data} has {len(items)} test picture: the shuffled control needs at least 2")
    return items


class Scorer:
    """Scores a model on items. dtype: arithmetic of the run, float32 or bfloat16."""

    def __init__(self, model: Flamingo, processor: FlamingoProcessor, dtype: str):
        self.model, self.processor, self.dtype = model, processor, dtype
        self.device = next(model.perceiver.parameters()).device

    def _captions(self, latents, items: Sequence[Item], title: str, **control) -> list[str]:
        return caption(
            self.model, self.processor, latents, [item.prompt for item in items],
            autocast=autocast(self.device, self.dtype), progress=title, **control,
        )  # fmt: skip

    def score(self, items: Sequence[Item], controls: bool = True) -> dict:
        """Exact match of `items`, over all and by group, beside its controls; every caption in `examples`."""
        latents = encode_pictures(
            self.model, self.processor, [item.picture for item in items], autocast=autocast(self.device, self.dtype)
        )
        said = {"exact_match": self._captions(latents, items, "captioning")}
        if controls:
            said["exact_match_blind"] = self._captions(latents, items, "blind", blind=True)
            others = [(i + 1) % len(items) for i in range(len(items))]
            said["exact_match_shuffled"] = self._captions(latents, items, "shuffled", picture_of=others)
        right = {name: [_is_right(text, item) for text, item in zip(captions, items, strict=True)]
                 for name, captions in said.items()}  # fmt: skip
        groups = sorted({item.group for item in items})
        members = {group: [i for i, item in enumerate(items) if item.group == group] for group in groups}
        return {
            "n": len(items),
            **{name: _mean(marks) for name, marks in right.items()},
            "by_objects": {
                group: {"n": len(which)} | {name: _mean([marks[i] for i in which]) for name, marks in right.items()}
                for group, which in members.items()
            },
            "examples": [
                {"prompt": item.prompt, "said": text, "true": item.truths[0], "right": mark}
                for item, text, mark in zip(items, said["exact_match"], right["exact_match"], strict=True)
            ],
        }


def _is_right(text: str, item: Item) -> bool:
    return normalise(text) in map(normalise, item.truths)


def _mean(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks)
