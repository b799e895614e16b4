"""Does it look at the picture? Score a finished run on pictures it has never seen.

    python evaluate.py runs/classroom                     writes runs/classroom/evaluation.json, prints the table

The score is *exact match*: the caption equals the right one, case and spaces aside. It stands beside two controls that
a model which does not look would score just as well on: `blind` (the picture is taken away) and `shuffled` (it is
shown another scene's picture and scored on its own).
"""

import argparse
import sys
from pathlib import Path

from flamingo.errors import InputError, run_command


def parse(argv: list[str]) -> argparse.Namespace:
    from flamingo.options import OneSentenceParser

    parser = OneSentenceParser(prog="evaluate.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="run folder that train.py wrote")
    parser.add_argument("--n", type=int, default=1000, help="pictures to score (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which scenes are drawn (default: %(default)s)")
    parser.add_argument("--data", default=None, help="score on this captioned set instead of the run's own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=8, help="captions to print (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.n < 2:
        raise InputError(f"--n must be at least 2, not {args.n}: the shuffled control needs another picture")
    return args


def main(args: argparse.Namespace) -> None:
    import time

    from flamingo.checkpoint import load_model, write_json
    from flamingo.data.sources import uses_classroom
    from flamingo.evaluation.exact_match import Scorer, classroom_items, set_items
    from flamingo.options import TrainingOptions, read_json
    from flamingo.training import hold_matrices_in_bf16, pick_device

    began = time.time()
    if not args.run.is_dir():
        raise InputError(f"{args.run}: no such run folder")
    summary = read_json(args.run / "summary.json")
    options = TrainingOptions(**summary["options"])
    if args.data:
        options.data, options.image_column, options.caption_columns = args.data, None, None
    model, processor, _ = load_model(args.run)
    model.to(pick_device(args.device))
    if summary["dtype"] == "bfloat16":
        hold_matrices_in_bf16(model, trained=True)
    scorer = Scorer(model, processor, summary["dtype"])

    if uses_classroom(options):
        result = scorer.score(classroom_items("test", args.n, args.seed))
        novel = scorer.score(classroom_items("novel", max(2, args.n // 2), args.seed), controls=False)
        result |= {"exact_match_novel": novel["exact_match"], "novel": novel}
    else:
        result = scorer.score(set_items(options, args.n)) | {"exact_match_novel": None}
    result["seconds"] = time.time() - began
    print_table(result)
    for example in result["examples"][: args.examples]:
        mark = "right" if example["right"] else "WRONG"
        print(
            f"  {mark}  {example['prompt']} {example['said']!r}"
            + ("" if example["right"] else f"  true: {example['true']!r}")
        )
    write_json(args.run / "evaluation.json", result)
    print(f"wrote {args.run}/evaluation.json in {result['seconds']:.0f} s")


def print_table(result: dict) -> None:
    """Score and controls, over all and by number of objects."""
    groups = ["all", *result["by_objects"]]
    print(f"exact match, n = {result['n']}")
    print(f"{'':24}" + "".join(f"{name:>12}" for name in groups))
    for name in ("exact_match", "exact_match_blind", "exact_match_shuffled"):
        cells = [result[name], *(result["by_objects"][group][name] for group in result["by_objects"])]
        print(f"{name:24}" + "".join(f"{cell:12.3f}" for cell in cells))
    if result["exact_match_novel"] is not None:
        novel = result["novel"]
        cells = [
            novel["exact_match"],
            *(novel["by_objects"].get(g, {}).get("exact_match", 0) for g in result["by_objects"]),
        ]
        print(f"{'exact_match_novel':24}" + "".join(f"{cell:12.3f}" for cell in cells) + f"   (n = {novel['n']})")


if __name__ == "__main__":
    run_command("evaluate.py", lambda: main(parse(sys.argv[1:])))
