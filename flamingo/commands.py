"""The console command `flamingo`, once the package is installed.

flamingo train …        train.py          flamingo evaluate RUN …    evaluate.py
flamingo caption RUN …  picture files     flamingo demo [RUN]        the page
flamingo doctor         versions, hardware and a self-check
"""

import runpy
import sys
from pathlib import Path

from flamingo.errors import InputError, run_command

COMMANDS = ("train", "evaluate", "caption", "demo", "doctor")


def script(name: str) -> Path:
    """train.py or evaluate.py: beside the package in a checkout, inside it where it is installed."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "scripts" / name, here.parent / name) if path.is_file())


def main() -> None:
    run_command("flamingo", lambda: dispatch(sys.argv[1:]))


def dispatch(argv: list[str]) -> None:
    """Raises InputError for an unknown command."""
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help"):
        print(__doc__.strip())
    elif command in ("train", "evaluate"):
        file = str(script(f"{command}.py"))
        sys.argv = [file, *rest]
        runpy.run_path(file, run_name="__main__")
    elif command == "caption":
        from flamingo.__main__ import main as caption

        caption(rest)
    elif command == "demo":
        from flamingo.demo.__main__ import main as demo

        demo(rest)
    elif command == "doctor":
        from flamingo.interop.doctor import doctor

        doctor()
    else:
        raise InputError(f"unknown command {command!r}: choose one of {', '.join(COMMANDS)}")
