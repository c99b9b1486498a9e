"""Ctrl-C ends a command at the first try, whenever it comes."""

import _thread
import atexit
import contextlib
import functools
import gc
import importlib.machinery
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from sedd_jax.runtime import last_words

STATUS = 130  # of a command that Ctrl-C ended
_SECONDS = 0.05  # until an interrupt that was dropped comes again


def keep() -> None:
    """Lets an interrupt come again that Python drops, as in a callback of its garbage collector. JAX has one there.

    Other exceptions that Python drops stay unsaid: threads of libraries would repeat what a command reports once.
    An interrupt while a native module begins waits until it has begun. Its C++ would abort the process (SIGABRT), or
    turn the interrupt into an ImportError. Once the command is over and Python takes itself down, an interrupt comes
    too late to end anything: it would only replace the command's status.
    """
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            gc.callbacks.clear()  # Where it would be dropped again. The command ends.
            threading.Timer(_SECONDS, _thread.interrupt_main).start()

    sys.unraisablehook = hook
    loader = importlib.machinery.ExtensionFileLoader
    for name in ("create_module", "exec_module"):
        setattr(loader, name, _whole(getattr(loader, name)))


def _whole(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def loaded(*given: Any) -> Any:
        with deferred():
            return load(*given)

    return loaded


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


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Ctrl-C inside waits until the end, as in `deferred`, and never reaches processes that are started inside."""
    with deferred(), blocked():
        yield


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Ctrl-C inside waits in the system, also for a program that takes the place of this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(status: int) -> NoReturn:
    """Ends the process with the status of a command.

    After Ctrl-C devices may still compute. Python's own end would free what they use, and crash (SIGSEGV).
    """
    bridge = sys.modules.get("jax._src.xla_bridge")  # It has no public name.
    if status != STATUS or bridge is None or not bridge.backends_are_initialized():
        sys.exit(status)
    last_words.take_back()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
