"""Ctrl-C ends a command at the first try, whenever it comes."""

import _thread
import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_SECONDS = 0.05  # until an interrupt that was dropped comes again


def keep() -> None:
    """Lets an interrupt come again that Python drops, as in a callback of its garbage collector. JAX has one there.

    Other exceptions that Python drops stay unsaid: threads of libraries would repeat what a command reports once.
    """

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            gc.callbacks.clear()  # Where it would be dropped again. The command ends.
            threading.Timer(_SECONDS, _thread.interrupt_main).start()

    sys.unraisablehook = hook


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C inside waits until the end. Libraries that run an event loop in it would take it for themselves."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python interrupts the main thread only.
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)
