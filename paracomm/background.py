"""Threads of ours in Python, and the end of the interpreter.

From a certain moment on the interpreter ends every other thread that asks for its lock, by unwinding the thread's
stack. Frames of C++ that may not throw, as torch's that complete a future or release a tensor, then end the process:
"terminate called without an active exception". A thread that is `busy` is waited for before that moment.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT_S = 2.0  # a thread may wait for an engine of torch's that never answers

_changed = threading.Condition()
_busy = 0


@contextmanager
def busy() -> Iterator[None]:
    """Around what a thread does in C++. Enter before what lets the main thread go on, and end."""
    global _busy
    with _changed:
        _busy += 1
    try:
        yield
    finally:
        with _changed:
            _busy -= 1
            _changed.notify_all()


def wait_until_idle() -> None:
    """Returns when no thread is busy, or after LIMIT_S. For the last of the interpreter's exit handlers."""
    with _changed:
        _changed.wait_for(lambda: _busy == 0, LIMIT_S)


_closes_at_exit = False


def close_at_exit() -> None:
    """Registers, once, the exit handler that closes communicators. Handlers run in the reverse order: those that a
    program registers after it imported torch (or paracomm) run before, and can still communicate."""
    global _closes_at_exit
    if not _closes_at_exit:
        _closes_at_exit = True
        atexit.register(_close)


def _close() -> None:
    communicators = sys.modules.get("paracomm.comm.communicator")
    if communicators is not None:
        communicators.close_all()
