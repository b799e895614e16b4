"""The processes of a run: which one am I, how many are we, and what do we know together?

What this file teaches: `torchrun --nproc-per-node 4 train.py` starts the same program four times. What makes one run
of four programs is little: each takes its share of the work (`share`), and what concerns all is added up or handed
round (`total`, `add_up`, `of_first`, `gathered`). Each of these is a *collective*: it waits until every process has
come to the same line. So all must decide alike on the way to one, or they wait for each other without end.

Alone, a process is the first of one, and all of this does nothing. (Imports torch only if there are several.)
"""

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from flamingo.errors import InputError, last_words, sentence_of

_rank, _count = 0, 1
LOST = ("gloo", "nccl", "connection closed", "connection reset")  # words of the errors when another process is gone


def rank() -> int:
    return _rank


def count() -> int:
    return _count


def is_first() -> bool:
    """The first process alone writes files and prints."""
    return _rank == 0


def local_rank() -> int:
    """Which of the processes on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _count > 1 else 0


def on_this_machine() -> int:
    """How many processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", _count)) if _count > 1 else 1


def restarts() -> bool:
    """Has torchrun started these processes again, after one of them failed?"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def may_restart() -> bool:
    """Will torchrun start these processes again if one of them fails?"""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


# -------------------------------------------------------------------------------------------------- collectives
def share(items: Sequence) -> Sequence:
    """This process's part: every so-manieth. Together the parts are the whole, nothing twice."""
    return items if _count == 1 else items[_rank::_count]


def total(*numbers: float) -> list[float]:
    """Each number added up over all processes. They are numbers of the CPU: a GPU need not wait for them."""
    if _count == 1:
        return list(numbers)
    import torch

    summed = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def add_up(tensor) -> None:
    """Add up a tensor over all processes, in place."""
    if _count > 1:
        import torch

        torch.distributed.all_reduce(tensor)


def of_first(work: Callable[[], object]):
    """What `work` gives in the first process, for all: anything that can be pickled (it touches no disk)."""
    if _count == 1:
        return work()
    import torch

    held = [work() if is_first() else None]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def gathered(value) -> list:
    """What each process has, in order, for all."""
    if _count == 1:
        return [value]
    import torch

    values = [None] * _count
    torch.distributed.all_gather_object(values, value)
    return values


# ------------------------------------------------------------------------------------------------ one run of many
@contextlib.contextmanager
def joined(name: str) -> Iterator[None]:
    """Inside, the processes that torchrun started are one run; a process that was started alone goes on alone.

    Only the first prints. If one ends, all do: who fails first says why, the others end without a word. name: of the
    command, for the sentence.
    """
    global _rank, _count
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "RANK" not in os.environ:
        yield
        return
    import torch

    at_its_end = atexit.register(_End())
    first, number = int(os.environ["RANK"]) == 0, int(os.environ["RANK"])
    store, _, _ = next(torch.distributed.rendezvous("env://", number, size))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # what an earlier one has left in the store is no use
    store = torch.distributed.PrefixStore(f"attempt {attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=number, world_size=size)
    at_its_end.group = torch.distributed.group.WORLD
    _rank, _count = number, size
    try:
        with _ending_together(store, name), contextlib.ExitStack() as muted:
            if not first:
                nothing = muted.enter_context(open(os.devnull, "w"))
                muted.enter_context(contextlib.redirect_stdout(nothing))
                muted.enter_context(contextlib.redirect_stderr(nothing))
            yield
        torch.distributed.destroy_process_group()  # not after an error: it would wait for who is gone
        at_its_end.all_is_well = True
    finally:
        _rank, _count = 0, 1


class _End:
    """The last that a process of several does, after a run that went well: it ends, and does not take Python down.

    The threads of gloo outlive their group, and may hold the last tensor they added up for a moment longer. One that
    lets go of it while Python is being taken down aborts the process (seen with torch 2.15, once in sixteen ends on a
    busy core), and torchrun calls a run failed that has written all it should. Whatever else is to be done at the exit
    has been done: its handlers were registered later, and those come first.

    And it keeps the group until then. A model in a DistributedDataParallel has it too: freed last of all, it would wait
    for these threads with Python's lock in its hand, which a thread needs to let go of its tensor (seen with torch 2.6,
    once in twenty-eight ends: that process never ended; not with 2.15).
    """

    all_is_well = False
    group = None

    def __call__(self) -> None:
        error_after_it = hasattr(sys, "last_value")  # one that nobody caught: it has an exit code of its own
        if self.all_is_well and not error_after_it:
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None where a shell has closed it
                stream.flush()
            os._exit(0)


@contextlib.contextmanager
def _ending_together(store, name: str) -> Iterator[None]:
    """One sentence from one process, and exit code 2 from all, whatever the user can mend; and when another process is
    gone, a sentence that says so."""

    def is_first_to_speak() -> bool:
        try:
            return store.add("spoken", 1) == 1
        except RuntimeError:  # the store was in the process that is gone
            return True

    def stop(*_) -> None:
        """torchrun ends the others when one has failed."""
        if os.getpid() == parent and is_first_to_speak():
            last_words(name)
            os._exit(143)
        os._exit(2)

    parent, before = os.getpid(), signal.signal(signal.SIGTERM, stop)
    try:
        yield
        signal.signal(signal.SIGTERM, before)
    except Exception as error:
        lost = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)
        if not lost and sentence_of(error) is None:
            raise  # a mistake of ours: its traceback, from whoever has it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is about to end, with an exit code of its own
        if not is_first_to_speak():
            sys.exit(2)
        if lost:
            way_on = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
            raise InputError(f"another process of this run has ended, so the others end too{way_on}") from error
        raise
