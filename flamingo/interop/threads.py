"""One thread at a time: a model that has been shown a picture belongs to the thread that showed it.

What this file teaches: the pictures of a call are held by the model's layers while it runs, so that a language model
which knows nothing of pictures can be called unchanged. Two threads in one model would see each other's; so the second
waits, as at any other thing of which there is one: a tokenizer is another.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCKS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # beside the things: no lock can be pickled
_MAKING_A_LOCK = threading.Lock()
_THIS_THREAD = threading.local()


@contextmanager
def one_at_a_time(thing: object) -> Iterator[None]:
    """Inside, no other thread is inside for the same thing; it waits until this one is through.

    Not while torch traces a call, which it does in one thread and without knowing locks. Raises RuntimeError if this
    very thread is inside already (a callback of `generate` that calls the model again): it would wait for itself.
    """
    if torch.compiler.is_compiling():
        yield
        return
    inside = vars(_THIS_THREAD).setdefault("inside", set())
    if id(thing) in inside:
        raise RuntimeError("a model that is generating was called again, by a callback of its own: give it a copy")
    with _MAKING_A_LOCK:
        lock = _LOCKS.setdefault(thing, threading.Lock())
    with lock:
        inside.add(id(thing))
        try:
            yield
        finally:
            inside.discard(id(thing))
