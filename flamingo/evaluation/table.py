"""What evaluate.py prints: the table beside its controls, few-shot, and some captions."""

from flamingo.evaluation.answer_tasks import answers_sentence
from flamingo.evaluation.few_shot import few_shot_columns
from flamingo.evaluation.gates import gates_sentence
from flamingo.evaluation.single_objects import binding_sentence


def print_result(result: dict, examples: int) -> None:
    """The table beside its controls, few-shot, and some captions."""
    print_table(result)
    print(result["verdict"])
    if result["shots"]:
        print_few_shot(result)
    if "closed_gates" in result:
        print(gates_sentence(result["closed_gates"]))
    if result["attention_hit_rate"] is not None:
        print(
            f"attention peaks on the thing named: {result['attention_hit_rate']:.3f} "
            f"(chance {result['attention']['chance']:.3f}, n = {result['attention']['n']} names)"
        )
    in_classroom = result["exact_match_novel"] is not None
    if examples and not in_classroom:
        print("CIDEr-D of each caption (0: nothing in common with what people wrote)")
    for example in result["examples"][:examples]:
        mark = ("right" if example["right"] else "WRONG") if in_classroom else f"{example['score']:5.2f}"
        true = "" if example["right"] else f"  true: {example['true']!r}"
        print(f"  {mark}  {example['prompt']} {example['said']!r}{true}".replace("  '", " '"))


def print_table(result: dict) -> None:
    """Exact match by number of objects, then every metric beside its controls, with intervals and scales."""
    groups = ["all", *result["by_objects"]]
    print(f"exact match, n = {result['n']}")
    print(f"{'':24}" + "".join(f"{name:>12}" for name in groups))
    for name in ("exact_match", "exact_match_blind", "exact_match_shuffled"):
        cells = [result[name], *(group[name] for group in result["by_objects"].values())]
        print(f"{name:24}" + "".join(f"{cell:12.3f}" for cell in cells))
    if result["exact_match_novel"] is not None:
        novel = result["novel"]
        cells = [novel["exact_match"], *(novel["by_objects"].get(g, {}).get("exact_match") for g in groups[1:])]
        row = "".join(" " * 11 + "–" if cell is None else f"{cell:12.3f}" for cell in cells)
        print(f"{'exact_match_novel':24}{row}   (n = {novel['n']})")
    print(f"\n{'':20}{'score':>8}{'95 % interval':>18}" + "".join(f"{name:>11}" for name in result["controls"]))
    for name, score in result["metrics"].items():
        interval = "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
        others = "".join(f"{control[name]['value']:11.3f}" for control in result["controls"].values())
        print(f"{name:20}{score['value']:8.3f}{interval:>18}{others}   {score['scale']}")
    print()


def print_few_shot(result: dict) -> None:
    """One row for each number of shots: mean ± spread over trials."""
    columns = few_shot_columns(result)
    way = result["few_shot"]
    print(f"\nfew-shot: examples {way['demos']}, mean ± spread of {way['trials']} draws; 0 shots: {way['zero_shot']}")
    print("shots" + "".join(f"{title.removesuffix('_demos'):>24}" for title, _, _ in columns))
    for k in result["shots"]:
        cells = [(table[k][score], table[k][f"{score}_spread"]) for _, table, score in columns]
        print(f"{k:>5}" + "".join(f"{value:16.3f} ± {spread:.3f}" for value, spread in cells))
    if words := answers_sentence(result):
        print(words)
    if "exact_match_style_given" in result:
        print(
            f"style named by its cue, no example: {result['exact_match_style_given']:.3f}, "
            f"novel {result['exact_match_novel_style_given']:.3f}; "
            f"guessing which one: {result['classification']['chance']:.3f}, "
            f"novel {result['classification_novel']['chance']:.3f}"
        )
    if "fast_binding" in result:
        print(binding_sentence(result["fast_binding"]))
    print()
