"""What a kill costs: tiny trainings, evaluations and cache builds are killed at random moments and gone on with.

    python -m benchmarks.kills --kills 100         SIGKILL so often, then a table; exit code 1 if anything was lost

Each command is first run undisturbed. Then it is started, killed at a random moment between its start and the time it
should take, and given again (a training with --resume where it kept a point), up to three times; then it may finish.
What it made must be what the undisturbed one made: weights and features bit for bit, scores number for number. (Each
command is forked off a process that has the libraries imported, so that the moments fall into its work.)
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

import evaluate
import train
from benchmarks.common import command, print_table
from flamingo.errors import InputError, OneSentenceParser, run_command
from flamingo.files import UNFINISHED, write_json
from flamingo.run_folder import RESUME_POINT, SUMMARY, in_run_folder
from flamingo.training.command_line import parse_training_options

SHORT = ["--steps", "8", "--batch-size", "4", "--eval-batches", "1", "--eval-every", "4", "--save-every", "2",
         "--dtype", "float32", "--device", "cpu", "--max-tokens", "32"]  # fmt: skip
EXAM = ["--n", "8", "--shots", "0", "1", "--trials", "1", "--device", "cpu", "--examples", "0"]
KILLS_OF_A_RUN = 3
PICTURES = 40


@dataclass
class Count:
    """What came of one kind of command."""

    seconds: float = 0.0  # undisturbed
    kills: int = 0
    went_on: int = 0  # … after a kill, from what had been kept; the other kills came before there was anything
    runs: int = 0
    same: int = 0  # … that made what the undisturbed one made
    left_over: int = 0  # files of killed commands that stayed
    faults: list[str] = field(default_factory=list)


class Command:
    """A command in a folder of its own, which may be killed and given again."""

    data: Path  # captioned pictures, for all of them

    def __init__(self, place: Path):
        self.place, self.run, self.said = place, place / "run", place / "said"
        place.mkdir(parents=True)

    def give(self) -> None:
        """What the command does."""
        raise NotImplementedError

    def kept(self) -> bool:
        """Is there something to go on with?"""
        raise NotImplementedError

    def made(self) -> object:
        """What is compared."""
        raise NotImplementedError

    def start(self) -> int:
        """Begin → the process's id."""
        pid = os.fork()
        if pid == 0:
            os._exit(_exit_code(self.give, self.said))
        return pid


def _exit_code(give: Callable[[], None], said: Path) -> int:
    with open(said, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            run_command("it", give)
        except SystemExit as error:
            return error.code
        except Exception:
            traceback.print_exc()
            return 1
    return 0


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a process; None if it is still at work after so many seconds, and killed then."""
    until = time.time() + seconds
    while time.time() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return 0 if status == 0 else None  # it ended while we made up our mind


class Training(Command):
    options: Sequence[str] = ("--cache", "off")

    def give(self) -> None:
        if (self.run / SUMMARY).exists():  # the kill came after all was written
            return
        new = [*SHORT, "--data", str(self.data), "--out", str(self.run), *self.options]
        in_run_folder(train.main, parse_training_options(["--resume", str(self.run)] if self.kept() else new))

    def kept(self) -> bool:
        return (self.run / RESUME_POINT).exists()

    def made(self) -> list[bytes]:
        return [(self.run / "model.safetensors").read_bytes()]


class CacheBuild(Training):
    """A training whose pictures' features are not yet cached."""

    def __init__(self, place: Path):
        super().__init__(place)
        self.options = ("--cache", str(place / "cache"))

    def made(self) -> list[bytes]:
        return [*super().made(), *(file.read_bytes() for file in sorted((self.place / "cache").glob("*/features.npy")))]


class Evaluation(Command):
    of: Path  # the run

    def __init__(self, place: Path):
        super().__init__(place)
        shutil.copytree(self.of, self.run)

    def give(self) -> None:
        evaluate.main(evaluate.parse([str(self.run), *EXAM]))

    def kept(self) -> bool:
        return (self.run / ".evaluation.partial.json").exists()

    def made(self) -> dict:
        result = json.loads((self.run / "evaluation.json").read_text())
        return {name: value for name, value in result.items() if not name.startswith("seconds")}


def try_out(kind: type[Command], kills: int, place: Path, rng: random.Random) -> Count:
    """Kill a kind of command so often."""
    count, began = Count(), time.time()
    whole = kind(place / "undisturbed")
    if wait(whole.start(), 3600) != 0:
        raise InputError(f"the undisturbed command failed: {whole.said.read_text()[-300:]}")
    count.seconds, made = time.time() - began, whole.made()
    while count.kills < kills:
        count.runs += 1
        work, code = kind(place / str(count.runs)), None
        for _ in range(min(KILLS_OF_A_RUN, kills - count.kills)):
            code = wait(work.start(), rng.uniform(0, count.seconds))
            if code is not None:  # it was quicker than the undisturbed one
                break
            count.kills += 1
            count.went_on += work.kept()
        code = wait(work.start(), 3600) if code is None else code
        if code == 0 and work.made() == made:
            count.same += 1
        else:
            count.faults.append(f"run {count.runs}: exit code {code}: {work.said.read_text()[-300:]}")
        count.left_over += sum(path.name.startswith(UNFINISHED) for path in work.place.rglob("*"))
        shutil.rmtree(work.place)
        print(f"{kind.__name__}: {count.kills} kills, {count.same} of {count.runs} runs the same", flush=True)
    return count


def captioned_pictures(folder: Path) -> Path:
    rng = random.Random(0)
    folder.mkdir()
    rows = []
    for number in range(PICTURES):
        colour = tuple(rng.randrange(256) for _ in range(3))
        Image.effect_noise((80, 60), 40).convert("RGB").point(lambda v: v // 2).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "caption": f"a picture of number {number} and of {colour[0]}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def main(argv: Sequence[str]) -> None:
    parser = OneSentenceParser(prog="python -m benchmarks.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="half of trainings, the others of the rest (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    if args.kills < 1:
        raise InputError(f"--kills must be at least 1, not {args.kills}")
    if not hasattr(os, "fork"):
        raise InputError("this system cannot fork a process: the kills need one")
    rng = random.Random(args.seed)
    shares = {Training: args.kills - 2 * (args.kills // 4), Evaluation: args.kills // 4, CacheBuild: args.kills // 4}
    counts: dict[str, Count] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        Command.data = captioned_pictures(Path(place) / "pictures")
        Evaluation.of = Path(place) / "Training" / "undisturbed" / "run"
        for kind, kills in shares.items():
            if kills:
                counts[kind.__name__] = try_out(kind, kills, Path(place) / kind.__name__, rng)
    head = ["killed", "seconds undisturbed", "kills", "went on", "runs", "the same", "left over"]
    rows = [[name, c.seconds, c.kills, c.went_on, c.runs, c.same, c.left_over] for name, c in counts.items()]
    print_table(head, [*rows, ["all", "", *(sum(row[i] for row in rows) for i in range(2, 7))]])
    if args.json:
        write_json(args.json, {name: vars(count) for name, count in counts.items()})
    faults = [f"{name}: {fault}" for name, count in counts.items() for fault in count.faults]
    print(*faults, sep="\n")
    if faults or any(count.left_over for count in counts.values()):
        sys.exit(1)


if __name__ == "__main__":
    command("kills", main, sys.argv[1:])
