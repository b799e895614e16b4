"""The model in a process of its own, and what stands for it in the page's.

What this file teaches: one Python process does one thing at a time, so PyTorch and Gradio, which take seconds to
import, would wait for each other. Two processes import at the same time. They talk through a pipe: a question carries
a number and its answers carry the same, so many visitors can wait at once. And when one end of a pipe is closed the
other notices, however the process there has ended; so neither outlives, or waits for, one that was killed.
"""

import contextlib
import gc
import itertools
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from multiprocessing.connection import Connection
from pathlib import Path
from traceback import format_exception

from tqdm import tqdm

from flamingo.demo.answers import About
from flamingo.errors import InputError, sentence_of

# What can be asked: the methods of DemoModel that the tabs call.
QUESTIONS = (
    "stream", "caption", "steps", "look", "losses", "distance_to_language_model", "few_shot", "who_sees_what",
)  # fmt: skip
GONE = "the model's process has ended (was there too little memory?): start the page again"


# ------------------------------------------------------------------------------------------- in the page's process
class RemoteModel:
    """A `DemoModel` (model.py) in a process of its own: the same questions, answers, InputErrors and ValueErrors.

    It begins to load at once, and what is asked meanwhile waits. What is asked after its process has ended, or was
    asked and not answered, raises InputError.
    """

    def __init__(self, run: Path, device: str = "auto"):
        new = multiprocessing.get_context("spawn")  # a forked process would begin with all that this one holds
        self._pipe, there = new.Pipe()
        # daemon: if this process ends with an error, it ends the other rather than wait for it.
        self._process = new.Process(target=answer_questions, args=(there, run, device), daemon=True)
        with deaf_to_ctrl_c():
            self._process.start()
        there.close()  # the other process alone holds that end now, so it is closed when that process ends
        self._numbers = itertools.count()
        self._waiting: dict[int, queue.SimpleQueue] = {}  # number of a question → where its answers go
        self._sending = threading.Lock()
        threading.Thread(target=self._deliver, daemon=True).start()

    @cached_property
    def about(self) -> About:
        """Waits for the model. Raises InputError if the folder holds no whole run."""
        (answer,) = self._ask("about")
        return answer

    def close(self) -> None:
        """Ends the model's process."""
        self._process.terminate()
        self._process.join()

    def __getattr__(self, question: str):
        """`model.caption(…)` asks for a caption: every one of QUESTIONS is a method here as it is of a DemoModel."""
        if question not in QUESTIONS:
            raise AttributeError(question)
        return partial(self._ask if question == "stream" else self._ask_for_one, question)

    def _ask_for_one(self, question: str, *given, **named):
        (answer,) = self._ask(question, *given, **named)
        return answer

    def _ask(self, question: str, *given, **named) -> Iterator:
        """The answers, as they come. Whoever wants no more of them just leaves: the other process does not wait."""
        number, answers = next(self._numbers), queue.SimpleQueue()
        self._waiting[number] = answers  # before it is sent, so that either the pipe is found closed or GONE comes
        try:
            with self._sending:
                self._pipe.send((number, question, given, named))
            while (answer := answers.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        except OSError:
            raise InputError(GONE) from None
        finally:
            del self._waiting[number]

    def _deliver(self) -> None:
        """Hands every answer to whoever waits for it; when there will be no more, tells all who wait."""
        try:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    number, answer = self._pipe.recv()
                    if answers := self._waiting.get(number):
                        answers.put(answer)
        finally:  # after any other error too, which this thread prints
            self._pipe.close()  # who asks from now on is told as well
            for answers in list(self._waiting.values()):
                answers.put(InputError(GONE))


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """A process that is started inside ignores Ctrl-C from its first moment: what it ignores is handed on."""
    if threading.current_thread() is not threading.main_thread():  # Python lets the main thread alone set this
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------ in the model's process
def answer_questions(pipe: Connection, run: Path, device: str) -> None:
    """What the model's process does: load the run's model, and answer each question in a thread of its own.

    The main thread only listens, to notice at any moment that the page has gone.
    """
    # Ctrl-C ends the page, and with it this process. (Where another thread than the main one started it, it can only be
    # told to be deaf here.)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loading = ThreadPoolExecutor(1).submit(load, run, device)
    sending = threading.Lock()

    def say(number: int, answer) -> None:
        with sending, contextlib.suppress(OSError):  # the page has gone, and the main thread will notice
            pipe.send((number, answer))

    with contextlib.suppress(EOFError, OSError):
        while True:
            number, *question = pipe.recv()
            threading.Thread(target=answer, args=(loading, partial(say, number), *question), daemon=True).start()
    os._exit(0)  # at once, whatever the threads are at: nothing here needs to be put in order


def load(run: Path, device: str):
    """The DemoModel of a run."""
    gc.disable()  # an import makes many objects and little garbage: looking for some took a tenth of the time
    tqdm.set_lock(threading.RLock())  # its usual one is the machine's, and a process that ends at once leaves it behind
    from flamingo.demo.model import DemoModel  # here: the page's process reads this file too, and must not import it

    model = DemoModel(run, device)
    gc.freeze()  # nor is there any among them later
    gc.enable()
    return model


def answer(loading: Future, say: Callable[[object], None], question: str, given: tuple, named: dict) -> None:
    """Says the answers to a question one by one, and None after the last; or its error."""
    try:
        model = loading.result()
        if question == "stream":
            for piece in model.stream(*given, **named):
                say(piece)
        else:
            say(model.about if question == "about" else getattr(model, question)(*given, **named))
        say(None)
    except BaseException as error:  # an exit that a library asks for, too: somebody waits
        say(as_told(error))


def as_told(error: BaseException) -> Exception:
    """An error as the page's process can read it, which lacks the libraries that errors may belong to."""
    if sentence := sentence_of(error):
        return InputError(sentence)
    if isinstance(error, ValueError):
        return ValueError(str(error))
    return RuntimeError("".join(format_exception(error)))
