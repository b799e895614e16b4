"""Does `python train.py` work with every seed? Each is trained and scored as a user would, and the worst is named.

    python -m benchmarks.seeds --seeds 10 [--json FILE] [--out FOLDER] [-- OPTIONS OF train.py]

A seed decides the weights that training begins with, the scenes and their order. A recipe that is reported for one seed
may be a lucky draw. So: every seed's exact match on the same test scenes, each seed with one attention gate after the
other closed, a curve for every seed, and what the worst one confuses. Seeds whose run folder is whole are not trained
again. Two things are asked that only the pictures of examples tell: names that five examples give (binding), and one
word by a rule that four examples follow.
"""

import sys
from pathlib import Path

import numpy as np

from benchmarks import common
from flamingo.evaluation.confusions import confusion_table, confusions
from flamingo.evaluation.controls import by_group
from flamingo.evaluation.few_shot import FewShot, Task, curve, one_word_task
from flamingo.evaluation.gates import without_each_gate
from flamingo.evaluation.metrics import exact_match
from flamingo.evaluation.parts import Parts
from flamingo.evaluation.predictor import Predictor
from flamingo.evaluation.run import BINDING_WAYS, EPISODES, NAMES, SCENES_OF_A_NAME
from flamingo.evaluation.single_objects import add_single_objects, binding_episodes
from flamingo.evaluation.test_set import EvaluationSet, classroom_test_set, one_word_scenes
from flamingo.fast.inference import prepare_to_generate
from flamingo.figures.run_figures import plt
from flamingo.run_folder import METRICS, SUMMARY, read_metrics, read_summary
from flamingo.training.checkpoint import load_model

EXAMPLES = 4  # of one word by a rule


def run_seed(seed: int, folder: Path, options: list[str]) -> None:
    """`python train.py --seed SEED`, unless it was run before. Raises InputError if it fails."""
    if (folder / SUMMARY).exists():
        return
    common.run_script("train.py", "--seed", str(seed), "--out", str(folder), *options)


def score_seed(folder: Path, n: int) -> dict:
    """What README reports of a seed: exact match in all, by number of things, of novel objects, and gate by gate."""
    summary, _ = read_summary(folder)
    model, processor, _ = load_model(folder)
    prepare_to_generate(model, summary["dtype"])
    predictor = Predictor(model, processor, summary["dtype"])
    test_set = classroom_test_set("test", n, 0)
    items, novel = test_set.items, test_set.novel
    rows, novel_rows = (predictor.add([item.picture for item in each]) for each in (items, novel))
    singles = add_single_objects(predictor, "train", 0, NAMES, SCENES_OF_A_NAME)
    episodes = binding_episodes(singles, min(EPISODES, n), 0, BINDING_WAYS[-1])
    rules = rules_task(predictor, test_set, min(EPISODES, n))
    parts = Parts(folder, {"benchmark": "seeds", "n": n})
    captions = parts.keep("test scenes", lambda: predictor.caption(rows, items, "test scenes"))
    marks = exact_match(captions, [item.truths for item in items])
    captions_novel = parts.keep("novel", lambda: predictor.caption(novel_rows, novel, "novel"))
    marks_novel = exact_match(captions_novel, [item.truths for item in novel])
    found = confusions([item.scene for item in items], [item.truths[0] for item in items], captions)
    result = {
        "seed": summary["seed"], "seconds": summary["seconds"], "exact_match": float(marks.mean()),
        "by_objects": {group: float(marks[which].mean()) for group, which in by_group(items).items()},
        "novel": float(marks_novel.mean()),
        "novel_by_objects": {group: float(marks_novel[which].mean()) for group, which in by_group(novel).items()},
        "gates": without_each_gate(predictor, parts, items, rows, captions, episodes, "fast binding", 0),
        "one_word": follows_rules(predictor, parts, rules),
        "confusions": {kind: counter.most_common() for kind, counter in found.items()},
        "table": confusion_table(found), "curve": curve_of(folder, summary["steps"]),
    }  # fmt: skip
    parts.finish()
    return result


def rules_task(predictor: Predictor, test_set: EvaluationSet, n: int) -> Task:
    """n pictures that are answered with one word each, by a rule that only the examples show."""
    drawn = one_word_scenes("test", n, 0)
    queries = list(zip(predictor.add([scene.draw() for scene in drawn]), drawn, strict=True))
    return one_word_task(queries, test_set, predictor.add([item.picture for item in test_set.support]))


def follows_rules(predictor: Predictor, parts: Parts, task: Task) -> dict[str, float]:
    """How often the word is right after EXAMPLES examples, and after their texts alone."""
    row = curve(task, FewShot(shots=(EXAMPLES,), trials=1), predictor, parts)[str(EXAMPLES)]
    return {way: row[way] for way in ("exact_match", "text_only_demos")}


def curve_of(folder: Path, steps: int) -> list[tuple[int, float]]:
    """(step, exact match of the validation scenes) of every validation."""
    entries = read_metrics(folder / METRICS, steps)
    return [(entry["step"], entry["exact_match"]) for entry in entries if "exact_match" in entry]


def draw(result: dict, path: Path) -> None:
    """Every seed's curve, what each scored, and the commonest confusions of the worst."""
    seeds, worst = result["seeds"], result["worst"]
    figure, (curves, scores, wrong) = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for held in seeds:
        is_worst = held["seed"] == worst
        color = "#d1495b" if is_worst else common.COLORS["ours"]
        label = f"seed {worst}, the worst" if is_worst else None
        curves.plot(*zip(*held["curve"], strict=True), "o-", ms=3, lw=1, color=color, alpha=0.8, label=label)
        scores.bar(str(held["seed"]), held["exact_match"], color=color)
    curves.set(xlabel="step", ylabel="exact match, 64 validation scenes", ylim=(0, 1.03), title="while it trains")
    curves.legend(frameon=False)
    scores.set(xlabel="seed", ylim=(0.9 * min(held["exact_match"] for held in seeds), 1), title="on the test scenes")
    kinds = next(held for held in seeds if held["seed"] == worst)["confusions"]
    bars = [(f"{kind}: {what}", count) for kind, pairs in kinds.items() for what, count in pairs[:4]]
    if bars:
        names, counts = zip(*bars, strict=True)
        wrong.barh(names, counts, color="#d1495b")
        wrong.invert_yaxis()
    wrong.set(title=f"what seed {worst} confuses")
    wrong.tick_params(axis="y", labelsize=7)
    for axes in (curves, scores, wrong):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, facecolor="white", format="png")
    plt.close(figure)


def main(argv: list[str]) -> None:
    own, options = common.own_and_further(argv)

    def add(parser) -> None:
        parser.add_argument("--seeds", type=int, default=10, help="seeds 0, 1, … (default: %(default)s)")
        parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
        parser.add_argument("--n", type=int, default=1000, help="test scenes (default: %(default)s)")
        parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="run folders (default: %(default)s)")

    args = common.parse("seeds", __doc__.splitlines()[0], own, add)
    if args.quick:
        options, args.n = [*options, "--steps", "4", "--eval-every", "2"], 8
    seeds = []
    for seed in range(args.first, args.first + args.seeds):
        run_seed(seed, args.out / f"seed-{seed}", options)
        seeds.append(score_seed(args.out / f"seed-{seed}", args.n))
        show([seeds[-1]])
    scores = np.array([held["exact_match"] for held in seeds])
    worst = seeds[int(scores.argmin())]
    print()
    show(seeds)
    print(f"\nmean {scores.mean():.3f}; worst: seed {worst['seed']} with {worst['exact_match']:.3f}\n{worst['table']}")
    common.finish(args, {"n": args.n, "options": options, "worst": worst["seed"], "seeds": seeds}, draw)


def show(seeds: list[dict]) -> None:
    """A line for each seed."""
    groups = list(seeds[0]["by_objects"])
    rows = [
        [held["seed"], held["seconds"], held["exact_match"], *held["by_objects"].values(), held["novel"],
         held["novel_by_objects"].get("1", float("nan")),
         held["gates"][0]["binding"], held["one_word"]["exact_match"], held["one_word"]["text_only_demos"],
         " ".join(f"{layer['gate']:+.2f}→{layer['exact_match_closed']:.2f},{layer['binding_closed']:.2f}"
                  for layer in held["gates"])]
        for held in seeds
    ]  # fmt: skip
    head = ["seed", "seconds", "exact match", *(f"{group} thing(s)" for group in groups), "novel", "one novel thing",
            "five-way binding", "one word", "… text only", "gate → exact match, binding without it"]  # fmt: skip
    common.print_table(head, rows)


if __name__ == "__main__":
    common.command("seeds", main, sys.argv[1:])
