"""Does it look at the picture, and does it learn from examples? Evaluate a finished run on pictures it has never seen.

    python evaluate.py runs/classroom                     writes evaluation.json and report.html into the run folder
    python evaluate.py runs/classroom --shots 0 4         few-shot prompts with no and four examples
    python evaluate.py runs/photos --data my_pictures --split test       also its questions or classes, if it has any
    torchrun --nproc-per-node 4 -- evaluate.py runs/classroom            the same by four processes that share the work

Every score stands beside its controls (flamingo/evaluation/controls.py); few-shot prompts are explained in
flamingo/evaluation/few_shot.py, the keys of evaluation.json in flamingo/evaluation/run.py. A stopped evaluation
goes on where it was when the same command is given again.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from flamingo import ranks
from flamingo.errors import InputError, run_command, way_on
from flamingo.limits import SEEDS, checked, in_range, must_fit, plain_text
from flamingo.run_folder import SUMMARY, held, read_summary

RANGES = {"n": (2, 10**9), "seed": (0, SEEDS), "queries": (2, 10**9), "trials": (1, 1000), "examples": (0, 10**9),
          "beams": (1, 64), "candidates": (1, 256)}  # fmt: skip
SCENE = 40_000  # bytes of memory for each: the picture, half a novel one, their latents


def parse(argv: list[str]) -> argparse.Namespace:
    from flamingo.errors import OneSentenceParser

    parser = OneSentenceParser(prog="evaluate.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", type=Path, help="run folder that train.py wrote")
    add("--n", type=int, default=1000, help="pictures to score (default: %(default)s)")
    add("--seed", type=int, default=0, help="which scenes and examples are drawn (default: %(default)s)")
    add("--data", default=None, help="score on this captioned set instead of the run's own")
    add("--image-column", default=None, help="its picture column, if it cannot be found")
    add("--caption-columns", default=None, help="its caption columns, comma separated, if they cannot be found")
    add("--allow-outside", action="store_true", help="let it name files outside of its own folder")
    for what in ("question", "answer", "label"):
        add(f"--{what}-column", default=None, help=f"its column of {what}s, if it cannot be found")
    add("--split", default=None, help="which split of it (default: test, or validation if there is no test split)")
    add("--shots", type=int, nargs="*", default=None, metavar="K",
        help="numbers of examples in few-shot prompts; no number: leave few-shot out (default: 0 1 2 4 8 in the "
             "classroom, 0 2 4 on captioned sets, as far as there are pictures)")  # fmt: skip
    add("--queries", type=int, default=250, help="pictures tested for each number of shots (default: %(default)s)")
    add("--trials", type=int, default=2, help="draws of examples for each number of shots (default: %(default)s)")
    add("--demos", choices=("random", "rices"), default="random",
        help="examples at random by seed, or the most similar pictures (default: %(default)s)")  # fmt: skip
    add("--template", default="", help='text between <image> and a caption in few-shot prompts, such as "Output:" for '
        "models of the Flamingo papers (default: none, as train.py trains)")  # fmt: skip
    add("--zero-shot", choices=("bare", "two-texts"), default="bare",
        help="what 0 shots shows: nothing, or two examples without their pictures, the Flamingo papers' convention "
             "(default: %(default)s)")  # fmt: skip
    add(
        "--beams",
        type=int,
        default=1,
        help="follow so many beginnings of a caption at once; the likeliest whole one wins (default: %(default)s)",
    )
    add("--candidates", type=int, default=1,
        help="draw so many captions; the one most like the others is given (default: %(default)s: the likeliest token "
             "each time)")  # fmt: skip
    add("--consensus", action="store_true",
        help="captioned sets: choose among the model's captions and those of up to 512 training pictures, by what "
             "people would write of such a picture and by the model's likelihood")  # fmt: skip
    add("--plain", action="store_true", help="leave out flamingo/fast: the model as flamingo/model has it, in float32")
    add("--device", default="auto", help="auto, cpu, cuda, … (default: %(default)s)")
    add("--examples", type=int, default=8, help="captions to print (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, (least, most) in RANGES.items():
        in_range(f"--{name}", getattr(args, name), least, most)
    for name, value in vars(args).items():
        if isinstance(value, str) and name != "template":
            checked(f"--{name.replace('_', '-')}", value, str)
    if (args.image_column or args.caption_columns) and not args.data:
        raise InputError("--image-column and --caption-columns belong to --data: name the set")
    if args.beams > 1 and args.candidates > 1:
        raise InputError("--beams and --candidates are two ways to choose a caption: give one of them")
    if args.consensus and args.candidates > 1:
        raise InputError("--consensus draws candidates of its own: leave --candidates out")
    for shots in args.shots or ():
        in_range("--shots", shots, 0, 10**6)
    args.run = args.run.expanduser()
    args.shots = args.shots if args.shots is None else sorted(set(args.shots))
    return args


def start(argv: list[str]) -> None:
    with ranks.joined("evaluate.py"):  # the processes that torchrun started, if it did
        main(parse(argv))


def main(args: argparse.Namespace) -> None:
    if args.run.is_dir() and not (args.run / SUMMARY).exists():  # no lock into a folder of somebody else's
        raise InputError(f"{args.run} is no finished run: it has no {SUMMARY}")
    with contextlib.ExitStack() as stack:
        ranks.of_first(lambda: stack.enter_context(held(args.run)))
        stack.enter_context(way_on(lambda: "the same command goes on from the last part that was kept"))
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    import time

    from flamingo.data.answer_columns import AnswerColumns
    from flamingo.evaluation.captioning import Decoding
    from flamingo.evaluation.parts import Parts
    from flamingo.evaluation.predictor import Predictor
    from flamingo.evaluation.report import write_report
    from flamingo.evaluation.run import plan, run_plan
    from flamingo.evaluation.table import print_result
    from flamingo.evaluation.test_set import SUPPORT, captioned_test_set, classroom_test_set
    from flamingo.fast.device import pick_device
    from flamingo.fast.inference import prepare_to_generate
    from flamingo.files import write_json
    from flamingo.interop.selfcheck import check_decoding
    from flamingo.settings import to_flat
    from flamingo.training.card import write_card
    from flamingo.training.checkpoint import WEIGHTS, load_model
    from flamingo.training.sources import uses_classroom

    began = time.time()
    summary, options = read_summary(args.run)
    options.allow_outside |= args.allow_outside
    if args.data:
        options.data, options.data_place, options.stream = args.data, None, False
        options.image_column, options.caption_columns = args.image_column, args.caption_columns
    device = pick_device(args.device)
    model, processor, config = load_model(args.run)
    plain_text("--template", args.template, processor.tokenizer)
    model.to(device)
    dtype = "float32" if args.plain else summary["dtype"]
    if not args.plain:
        prepare_to_generate(model, dtype)

    columns = AnswerColumns(args.question_column, args.answer_column, args.label_column)
    if uses_classroom(options):
        if columns != AnswerColumns():
            raise InputError("--question-column, --answer-column and --label-column belong to --data: name the set")
        if args.consensus:
            raise InputError("--consensus belongs to a captioned set: no two classroom scenes are of one kind")
        must_fit(args.n * SCENE, f"--n {args.n:,}", "ask for fewer")
        test_set = classroom_test_set(args.split, args.n, args.seed)
    else:
        support = SUPPORT if args.consensus else None  # a regression needs as many as there are, however small n is
        test_set = captioned_test_set(options, args.split, args.n, args.seed, columns, support)
    predictor = Predictor(model, processor, dtype, Decoding(args.beams, args.candidates, args.consensus), args.seed)
    check_decoding(model, predictor.autocast)
    todo = plan(test_set, predictor, args)  # mistakes are found here, before anything is run
    weights = (args.run / WEIGHTS).stat()
    arguments = {name: str(value) for name, value in vars(args).items() if name not in ("run", "examples", "device")}
    arguments |= {"exam": test_set.fingerprint(), "model": [weights.st_size, weights.st_mtime_ns]}
    parts = Parts(args.run, arguments)

    result = run_plan(todo, predictor, parts)
    result |= {
        "options": summary.pop("options"),
        "cost": summary,
        "config": to_flat(config),
        "seconds": time.time() - began,
    }
    print_result(result, args.examples)
    if not ranks.is_first():
        return
    write_report(args.run, test_set, result)
    write_json(args.run / "evaluation.json", result)
    write_card(args.run)
    parts.finish()
    print(f"wrote {args.run}/evaluation.json and {args.run}/report.html in {result['seconds']:.0f} s")


if __name__ == "__main__":
    run_command("evaluate.py", lambda: start(sys.argv[1:]))
