"""Ctrl-C ends a command at the first try, whenever it comes."""

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
_PATIENCE = 1.0  # seconds that an interrupt has to arrive


# Native modules. One that an interrupt drops before it has begun would take itself down, and crash (SIGSEGV).
_created: list[Any] = []


class _State:
    """What became of the interrupts of this process.

    Attributes:
        has_come: whether there was one.
        has_arrived: whether the command has ended for it.
        is_repeated: whether the next one is a repetition.
    """

    has_come = has_arrived = is_repeated = False


def keep() -> None:
    """Lets an interrupt come again that is dropped, until `arrived` is called.

    Python drops those in a callback of its garbage collector; JAX has one there. C++ that calls Python, as JAX does to
    compare keys, drops some or turns them into other errors. A repetition spares code that is cleaning up.

    Other exceptions that Python drops stay unsaid: threads of libraries would repeat what a command reports once.
    An interrupt while a native module begins waits until it has begun. Its C++ would abort the process (SIGABRT), or
    turn the interrupt into an ImportError. Once the command is over and Python takes itself down, an interrupt comes
    too late to end anything: it would only replace the command's status.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            gc.callbacks.clear()  # Where it would be dropped again. The command ends.
            threading.Timer(_SECONDS, _repeat).start()

    sys.unraisablehook = hook
    loader = importlib.machinery.ExtensionFileLoader
    for name in ("create_module", "exec_module"):
        setattr(loader, name, _whole(getattr(loader, name)))


def _interrupt(*_: Any) -> None:
    is_repeated, _State.is_repeated = _State.is_repeated, False
    if is_repeated and _State.has_arrived:
        return
    _State.has_come = True
    again = threading.Timer(_PATIENCE, _repeat)
    again.daemon = True
    again.start()
    if not (is_repeated and _is_cleaning_up()):
        raise KeyboardInterrupt


def _repeat() -> None:
    if not _State.has_arrived:
        _State.is_repeated = True
        # A signal, since it ends a system call that waits, too.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _is_cleaning_up() -> bool:
    """Whether an interrupt is being handled, as in a `finally`."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def has_come() -> bool:
    """Whether Ctrl-C was pressed. What fails afterwards may fail for that."""
    return _State.has_come


def arrived() -> None:
    """Says that the command ends: an interrupt comes no more by itself."""
    _State.has_arrived = True


def _whole(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def loaded(*given: Any) -> Any:
        with deferred():
            found = load(*given)
            _created.append(found)
            return found

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
