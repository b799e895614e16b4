"""Mistakes a user can mend: one sentence each, and exit code 2. Internal errors keep their traceback.

What this file teaches: how a command may end. With a sentence for what the user can mend (an option, a file, a full
disk, too little memory); with a traceback for what only we can mend; and at Ctrl-C and the like at once, wherever it
is, with the command that goes on.
"""

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator


class InputError(ValueError):
    """A mistake in an option, a path, the data or a checkpoint. Commands print it and exit with 2."""

    def __init__(self, sentence: object = ""):
        # What a process that prepares pictures raises, torch raises again with its traceback in front of the sentence.
        super().__init__(str(sentence).rpartition(f"{__name__}.InputError: ")[2].strip())


class OneSentenceParser(argparse.ArgumentParser):
    """argparse prints its usage before a mistake; one sentence is enough."""

    def error(self, message: str):
        raise InputError(f"{' '.join(message.split())} (see {self.prog} --help)")


# Reasons of an OSError that lie with the disk or the path, whatever we were about to do.
OF_THE_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE,
}  # fmt: skip

_ways_on: list[Callable[[], str]] = []  # the innermost last


@contextlib.contextmanager
def way_on(sentence: Callable[[], str]) -> Iterator[None]:
    """While this lasts, Ctrl-C ends with `sentence()`: how to go on. An error takes it along as a note."""
    _ways_on.append(sentence)
    try:
        yield
    except Exception as error:
        error.add_note(sentence())
        raise
    finally:
        _ways_on.remove(sentence)


def run_command(name: str, command: Callable[[], None]) -> None:
    """Run a command line: what a user can mend ends with one sentence and exit code 2, Ctrl-C with 130, another signal
    (a pipe that nobody reads is one) with 128 and its number, as a shell says it."""
    for stream in (sys.stdout, sys.stderr):  # a name of a file that this terminal's letters cannot write
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with _stopping_at_once(name):
        try:
            command()
            if sys.stdout is not None:  # as it is where a shell has closed it
                sys.stdout.flush()  # here, where a pipe that nobody reads is caught
        except BrokenPipeError:  # `| head -1` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the last flush would fail once more
            _leave(f"{name}: stopped, for nobody reads its output any more", 128 + 13)
        except KeyboardInterrupt:
            _leave(stopped(name), 130)
        except Exception as error:
            sentence = sentence_of(error)
            if sentence is None:
                raise
            _leave(f"{name}: {sentence}", 2)


def sentence_of(error: Exception) -> str | None:
    """What to say of an error that a user can mend; None of one that is ours."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        return f"{error.filename or 'a file cannot be written'}: {error.strerror}"
    if isinstance(error, (MemoryError, RuntimeError)) and _is_out_of_memory(error):
        return "out of memory: ask for less at a time (train.py: a smaller --batch-size)"
    return None


def _leave(sentence: str, code: int) -> None:
    print(sentence, file=sys.stderr)
    sys.exit(code)


def _is_out_of_memory(error: Exception) -> bool:
    """torch has an error of its own for GPUs, and for CPUs only words."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        "can't allocate memory" in str(error)
    )  # fmt: skip


def stopped(name: str) -> str:
    """What a command says that is stopped from outside, with how to go on."""
    return f"\n{name}: stopped" + "".join(f"; {sentence()}" for sentence in _ways_on[-1:])


def last_words(name: str) -> None:
    """Says `stopped(name)`, in a handler of a signal: the process is about to end. Should a pipe be full that nobody
    reads, the words wait there, and the alarm ends the process in two seconds. (Windows has none.)"""
    sentence = stopped(name)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(2)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(2, f"{sentence}\n".encode())


# Ctrl-C, a polite kill (of a scheduler, of `docker stop`), a terminal that is closed.
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def _stopping_at_once(name: str) -> Iterator[None]:
    """Let the signals of STOPS end the process there and then. As an exception Ctrl-C would pass through whatever is
    being imported or called, and there are libraries that swallow it and others that abort. All that a run keeps is
    whole at any moment, for it must survive a kill as well."""
    parent = os.getpid()

    def stop(number: int, _) -> None:
        # A process that prepares pictures, or one of several that torchrun started: another one speaks.
        if os.getpid() != parent or os.environ.get("RANK", "0") != "0":
            os._exit(128 + number)
        last_words(name)
        os._exit(128 + number)

    before = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of a job in the background, or under nohup
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if (
                signal.getsignal(number) is stop
            ):  # one of several processes that is about to end ignores them (ranks.py)
                signal.signal(number, handler)
