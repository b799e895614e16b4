"""Mistakes a user can mend: one sentence each, and exit code 2. Internal errors keep their traceback."""

import argparse
import sys
from collections.abc import Callable


class InputError(ValueError):
    """A mistake in an option, a path, the data or a checkpoint. Commands print it and exit with 2."""


class OneSentenceParser(argparse.ArgumentParser):
    """argparse prints its usage before a mistake; one sentence is enough."""

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def run_command(name: str, command: Callable[[], None]) -> None:
    """Run a command line: a user's mistake ends with one sentence and exit code 2, Ctrl-C with 130."""
    try:
        command()
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        sys.exit(130)
