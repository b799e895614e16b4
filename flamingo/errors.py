"""The one exception that means "you can mend this": its text is a sentence for the user, not for a developer."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """A mistake in an option, a path, the data or a checkpoint. train.py and evaluate.py print it and exit with 2."""


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
