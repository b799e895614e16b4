"""The whole evaluation: plan it, carry it out (table.py prints it). What `evaluation.json` holds is listed here.

n, exact_match, exact_match_blind, exact_match_shuffled, exact_match_novel
                        plain numbers; case and spaces do not count (novel: null on captioned sets)
by_objects              number of drawn things (captioned sets: of pictures) → n and the exact matches
novel                   the scenes of novel objects: n, exact_match, by_objects, metrics (not on captioned sets)
metrics                 name → {value, low, high, n, scale}; low and high are the 95 % interval over pictures
controls                blind, shuffled, constant, copy_demo, captioned sets also nearest, typical
                        (and consensus: consensus.py) → metrics
looks, verdict          does it look: true or false, and in a sentence; headline_metric: by which score
gain                    control → {value, low, high}: score minus control, paired by picture
exact_match_style_given, exact_match_novel_style_given
                        classroom: of the few-shot queries, no examples, but the style named by its cue
shots                   "0", "1", … → exact_match, exact_match_novel (null on captioned sets), text_only_demos, each
                        with …_spread (standard deviation over trials) and …_interval (95 %, over queries); n,
                        trials; captioned sets also cider_d, cider_d_text_only_demos
few_shot                how examples were chosen: demos, zero_shot, template, trials, support (how many to draw from)
questions               classroom and sets with questions: shots: "0", "1", … → exact match of answers, as in shots.
                        On sets: n, left_out (no text); matches in VQAv2's form of answers; if several people answered
                        each question, vqa_accuracy, …_text_only_demos; at 0 shots blind, vqa_accuracy_blind: the
                        picture taken away
classification, classification_novel
                        classroom and sets with labels (not novel): the same for "which of these is it?", by
                        likelihood; chance, names (how many)
                        (in the classroom without text_only_demos: the query's picture alone tells)
one_word                classroom: chance; shots: the same, with text_only_demos and shuffled_demos
fast_binding            classroom: accuracy, low, high, n, chance, and its controls blind, text_only_demos; novel: the
                        same for novel objects; five_way: both, of five examples
closed_gates            classroom: for each layer that looks its gate; exact_match of the first items and binding (five
                        ways), and both with this gate at 0: exact_match_closed, binding_closed (not in a language
                        stream, which has no gates)
attention_hit_rate      classroom: how often the attention of a name peaks on the thing named (null: no such name, or no
                        resampler and cross-attention whose attention could be recorded)
attention               chance, n, pictures; examples: {item, word, grid} as shown in the report
examples                every item: prompt, said, true (one right caption), right, score (CIDEr-D of this picture)
data, split, arguments  what was scored;  seconds, seconds_by_part (a part that was kept from before takes none)
options, cost, config   of the run: its training options, its summary, its architecture (flat names)
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from flamingo.classroom import scenes
from flamingo.errors import InputError
from flamingo.evaluation import attention, controls
from flamingo.evaluation.answer_tasks import answer_results, classes_of_set, questions_of_set
from flamingo.evaluation.few_shot import (
    FewShot,
    Task,
    captioning_task,
    check_shots,
    curve,
    one_word_task,
    questions_task,
)
from flamingo.evaluation.gates import without_each_gate
from flamingo.evaluation.metrics import cider_d, exact_match
from flamingo.evaluation.parts import Parts
from flamingo.evaluation.predictor import Predictor
from flamingo.evaluation.ptb import ptb_tokens
from flamingo.evaluation.single_objects import (
    Episode,
    add_single_objects,
    binding_episodes,
    classification_task,
    fast_binding,
)
from flamingo.evaluation.test_set import EvaluationSet, one_word_scenes

CLASSROOM_SHOTS, SET_SHOTS = (0, 1, 2, 4, 8), (0, 2, 4)
FEWER = 100  # questions, classifications: queries for each number of shots
NAMES, SCENES_OF_A_NAME = 20, 6  # to choose among in classification; each shown on this many grounds
EPISODES, BINDING_WAYS = 200, (2, 5)  # of fast binding
LOOKED_AT = {True: 200, False: 32}  # pictures whose attention is worked out: in the classroom, of a captioned set


@dataclass
class Plan:
    """All that will be scored. rows, novel_rows, support_rows: their pictures in the bank (the support's only where it
    is used). how: None leaves few-shot out."""

    test_set: EvaluationSet
    seed: int
    rows: list[int]
    novel_rows: list[int]
    support_rows: list[int]
    how: FewShot | None
    template: str
    tasks: dict[str, Task]
    episodes: dict[str, list[Episode]]


def plan(test_set: EvaluationSet, predictor: Predictor, args: argparse.Namespace) -> Plan:
    """Put every picture into the bank and every query on the list.

    Raises InputError for shots that there are too few pictures or positions for.
    """
    rows = predictor.add([item.open for item in test_set.items])
    novel_rows = predictor.add([item.open for item in test_set.novel])
    shots = args.shots
    if shots is None:  # as many of the usual numbers as there are pictures for
        usual = CLASSROOM_SHOTS if test_set.classroom else SET_SHOTS
        shots = [k for k in usual if k < len(test_set.support)]
    uses_support = bool(shots) or not test_set.classroom
    support = predictor.add([item.open for item in test_set.support]) if uses_support else []
    result = Plan(test_set, args.seed, rows, novel_rows, support, None, args.template, {}, {})
    if not shots:
        return result
    trials = args.trials if args.demos == "random" else 1  # the most similar are the same in every draw
    how = FewShot(shots, trials, args.demos, args.zero_shot, args.seed)
    if max(shots) > len(test_set.support):
        raise InputError(
            f"--shots {max(shots)} asks for more examples than there are pictures to draw them from: {test_set.source} "
            f"has {len(test_set.support)}"
        )
    n = min(args.queries, len(test_set.items))
    few = [test_set, support, args.template]
    tasks = {"captions": captioning_task("captions", test_set.items[:n], rows[:n], *few)}
    fewer = min(n, FEWER)
    if test_set.classroom:
        novel = min(n, len(test_set.novel))
        tasks["captions_novel"] = captioning_task("captions (novel)", test_set.novel[:novel], novel_rows[:novel], *few)
        tasks["questions"] = questions_task(test_set.items[:fewer], rows[:fewer], test_set, support, args.seed)
        for kind, split in (("", "train"), ("_novel", "novel")):  # one object is no pair: new in every split
            singles = add_single_objects(predictor, split, args.seed, NAMES, SCENES_OF_A_NAME)
            tasks[f"classification{kind}"] = classification_task(f"classification{kind}", singles, fewer)
            for ways in BINDING_WAYS:
                result.episodes[f"fast binding{kind} {ways}"] = binding_episodes(
                    singles, min(EPISODES, n), args.seed, ways
                )
        drawn = one_word_scenes(test_set.split, fewer, args.seed)
        queries = list(zip(predictor.add([scene.draw() for scene in drawn]), drawn, strict=True))
        tasks["one_word"] = one_word_task(queries, test_set, support)
    else:
        asked = (questions_of_set(test_set, rows, support, args.queries, args.seed),
                 classes_of_set(test_set, rows, support, fewer, args.template))  # fmt: skip
        tasks |= {task.name: task for task in asked if task}
    result.how, result.tasks = _that_fit(how, tasks, predictor, asked=args.shots is not None), tasks
    return result


def _that_fit(how: FewShot, tasks: dict[str, Task], predictor: Predictor, asked: bool) -> FewShot:
    """Raises InputError if the shots do not fit and were given (`asked`); of the usual ones those that fit are kept."""
    try:
        for task in tasks.values():
            check_shots(task, how, predictor)
    except InputError:
        if asked or len(how.shots) == 1:
            raise
        return _that_fit(replace(how, shots=how.shots[:-1]), tasks, predictor, asked)
    return how


def run_plan(todo: Plan, predictor: Predictor, parts: Parts) -> dict:
    """Carry it out → what evaluation.json holds, but for the keys that evaluate.py adds."""
    test_set, took = todo.test_set, {}

    def timed(name: str, work: Callable):
        began = time.time()
        value = work()
        took[name] = round(time.time() - began, 2)
        return value

    predictions = timed("captions and controls", lambda: controls.answer_all(
        predictor, parts, test_set, todo.rows, todo.novel_rows, todo.seed, todo.support_rows))  # fmt: skip
    result = timed("scores", lambda: controls.score_with_controls(test_set, predictions, todo.seed))
    result |= timed("few-shot", lambda: few_shot_results(todo, predictions, predictor, parts))
    result |= timed(
        "attention", lambda: parts.keep("attention", lambda: attention_results(todo, predictions, predictor))
    )
    if todo.episodes and predictor.model.cross_attention_blocks():
        title = f"fast binding {BINDING_WAYS[-1]}"
        result["closed_gates"] = timed("gates", lambda: without_each_gate(
            predictor, parts, test_set.items, todo.rows, predictions["own"], todo.episodes[title], title, todo.seed,
        ))  # fmt: skip
    result["examples"] = [
        {"prompt": item.prompt, "said": text, "true": item.truths[0], "right": bool(right), "score": float(score)}
        for item, text, right, score in zip(
            test_set.items, predictions["own"], *_per_picture(test_set, predictions["own"]), strict=True
        )
    ]
    settings = {"seed": todo.seed, "queries": len(todo.tasks["captions"].queries) if todo.tasks else 0}
    return result | {"data": test_set.source, "split": test_set.split, "arguments": settings, "seconds_by_part": took}


def _per_picture(test_set: EvaluationSet, captions: list[str]):
    truths = [item.truths for item in test_set.items]
    references = [[ptb_tokens(text) for text in texts] for texts in truths]
    return exact_match(captions, truths), cider_d([ptb_tokens(text) for text in captions], references)


def few_shot_results(todo: Plan, predictions: dict[str, list[str]], predictor: Predictor, parts: Parts) -> dict:
    """The keys from `exact_match_style_given` to `fast_binding`."""
    test_set, how, tasks = todo.test_set, todo.how, todo.tasks
    if how is None:
        return {"shots": {}}
    shots = curve(tasks["captions"], how, predictor, parts)
    novel = curve(tasks["captions_novel"], how, predictor, parts, controls=()) if test_set.classroom else {}
    names = ("exact_match", "exact_match_spread", "exact_match_interval")
    for k, row in shots.items():
        row |= {name.replace("match", "match_novel"): novel[k][name] if novel else None for name in names}
    result = {
        "shots": shots,
        "few_shot": {
            "demos": how.demos, "zero_shot": how.zero_shot, "template": todo.template, "trials": how.trials,
            "support": len(test_set.support),
        },
    }  # fmt: skip
    if not test_set.classroom:
        return result | answer_results(
            test_set, tasks, lambda task: curve(task, how, predictor, parts, ("text_only_demos", "blind"))
        )
    given = {"exact_match_style_given": (predictions["own"], test_set.items, "captions"),
             "exact_match_novel_style_given": (predictions["novel"], test_set.novel, "captions_novel")}  # fmt: skip
    for name, (captions, items, task) in given.items():
        n = len(tasks[task].queries)
        result[name] = float(exact_match(captions[:n], [item.truths for item in items[:n]]).mean())
    result["questions"] = {"shots": curve(tasks["questions"], how, predictor, parts)}
    for name in ("classification", "classification_novel"):
        task = tasks[name]
        table = curve(task, how, predictor, parts, controls=())
        result[name] = {"chance": task.chance, "names": len(task.answers), "shots": table}
    both = ("text_only_demos", "shuffled_demos")
    result["one_word"] = {
        "chance": tasks["one_word"].chance, "shots": curve(tasks["one_word"], how, predictor, parts, both),
    }  # fmt: skip
    result["fast_binding"] = binding_results(todo, predictor, parts)
    return result


def binding_results(todo: Plan, predictor: Predictor, parts: Parts) -> dict:
    """Two ways, and beside them the same for five ways and for novel objects."""

    def measured(kind: str, ways: int) -> dict:
        title = f"fast binding{kind} {ways}"
        return fast_binding(predictor, parts, todo.episodes[title], title, todo.seed, controls=not kind)

    two, five = (measured("", ways) | {"novel": measured("_novel", ways)} for ways in BINDING_WAYS)
    return two | {"five_way": five}


def attention_results(todo: Plan, predictions: dict[str, list[str]], predictor: Predictor) -> dict:
    """`attention_hit_rate` and `attention`. These pictures are encoded once more, for the resampler's attention."""
    test_set = todo.test_set
    if not attention.can_be_recorded(predictor.model):
        nothing = {"chance": None, "n": 0, "pictures": 0, "examples": []}
        return {"attention_hit_rate": None, "attention": nothing}
    items, captions = (
        test_set.items[: LOOKED_AT[test_set.classroom]],
        predictions["own"][: LOOKED_AT[test_set.classroom]],
    )
    looks = attention.word_looks(
        predictor.model, predictor.processor, [item.open for item in items], [item.prompt for item in items],
        captions, autocast=predictor.autocast,
    )  # fmt: skip
    hits = {"attention_hit_rate": None, "chance": None, "n": 0}
    if test_set.classroom:
        hits = attention.hit_rate(looks, [item.scene for item in items])
    names = {form for name in scenes.OBJECTS for form in (name, scenes.plural(name))}
    telling = [look for look in looks if (look.word in names if test_set.classroom else len(look.word) > 3)]
    shown, words_of = [], {}
    for look in telling:
        count = words_of.get(look.picture, 0)
        if count < 3 and (look.picture in words_of or len(words_of) < 4):
            words_of[look.picture] = count + 1
            grid = [[round(value, 5) for value in row] for row in look.grid.tolist()]
            shown.append({"item": look.picture, "word": look.word, "grid": grid})
    return {
        "attention_hit_rate": hits["attention_hit_rate"],
        "attention": {"chance": hits["chance"], "n": hits["n"], "pictures": len(items), "examples": shown},
    }
