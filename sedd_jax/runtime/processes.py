"""Runs of several processes, each with devices of its own: how they connect, wait for each other and stop."""

import collections
import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # The key-value store of the processes has no public name.
from jax.experimental import multihost_utils

from sedd_jax.runtime import errors, last_words

_PREPARATION_MS = 24 * 60 * 60 * 1000  # The others wait while the first process may tokenize a corpus.
_SHUTDOWN_SECONDS = 60
_MEETING_SECONDS = 300  # Processes of one run may start minutes apart, as where each host loads a container.
_SAID_AFTER_SECONDS = 5  # Processes that start together meet sooner.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")  # Variables that say how many processes a cluster has started.

# Numbers of the calls of `first_then_all` by their name: a key is set only once.
_numbers: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to the others of a run, if the arguments or the cluster say that there are others.

    Call it before JAX starts. Without arguments JAX detects the cluster (TPU pod, SLURM, GKE). If there is none, or if
    num_processes is 1, the process runs alone.

    Args:
        coordinator_address: host:port of process 0, to which the others connect.
        num_processes: number of processes.
        process_id: number of this process, from 0.

    Raises:
        errors.UserError: if only some of the three are given, a value is impossible, or the others do not come.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if num_processes == 1:
        return
    if len(missing) in (1, 2):
        raise errors.UserError(
            "is missing", field=missing[0], remedy=f"give all of {', '.join(map(errors.name, given))}, or none"
        )
    if coordinator_address is not None and num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise errors.UserError(
                f"must be from 0 to {num_processes - 1}, below {errors.name('num_processes')}",
                field="process_id",
                value=process_id,
            )
        _check_address(coordinator_address, listens=process_id == 0)
    if not _meet(given):
        return
    last_words.begin()
    if jax.default_backend() == "cpu":
        # Only the first process would find a cached program. It would run it while the others still compile, and on
        # CPUs a collective times out after half a minute.
        jax.config.update("jax_enable_compilation_cache", False)


def is_first() -> bool:
    """Whether this is the first process, which writes what is written only once."""
    # A process that runs alone does not have to initialize its devices for this.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def first_then_all(name: str, fn: Callable[[], object]) -> None:
    """Runs fn in the first process while the others wait for it to finish. If fn fails, all processes fail.

    Args:
        name: a name for the work. All processes do the work of a name equally often.
        fn: the work.

    Raises:
        errors.UserError: in the other processes, with the message of the first.
    """
    if jax.process_count() == 1:
        fn()
        return
    client, key = distributed.global_state.client, f"sedd_jax/{name}/{next(_numbers[name])}"
    assert client is not None
    if is_first():
        outcome = "failed"
        try:
            fn()
            outcome = ""
        except Exception as error:
            # Names of inputs stay marked, so that the other processes spell them the same way.
            said = error.worded(errors.name) if isinstance(error, errors.UserError) else str(error)
            outcome = said or outcome
            raise
        finally:
            client.key_value_set(key, f"outcome: {outcome}")
    else:
        told = client.blocking_key_value_get(key, _PREPARATION_MS)
        if outcome := str(told).removeprefix("outcome: "):
            raise errors.UserError(f"process 0 says: {outcome}")


def agreed(fn: Callable[[], bool]) -> bool:
    """What fn returns in the first process, in all of them."""
    if jax.process_count() == 1:
        return fn()
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(is_first() and fn())))


def describe() -> str:
    """This process, the number of processes and the host, for messages."""
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[int], bool]]:
    """A function of the step just taken, which returns whether to stop there because SIGTERM, or SIGHUP, has arrived.

    A process that runs alone installs a signal handler, which Python allows only in the main thread. Of several
    processes, any may receive the signal. JAX then chooses one step for all, so each must call the function at every
    step.
    """
    if jax.process_count() > 1:
        with _stopped_by_hangup():
            yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()
    is_told = lambda step: told.is_set()
    if threading.current_thread() is not threading.main_thread():
        yield is_told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        with _stopped_by_hangup():
            yield is_told
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _stopped_by_hangup() -> Iterator[None]:
    """SIGHUP inside, which comes when a terminal is closed, acts as SIGTERM. Other handlers stay, as that of nohup."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:
        yield
        return
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def hang_up(*_: Any) -> None:
        for number in terminals:
            if not os.isatty(number):  # The terminal is gone. To write there would fail before the save.
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, number)
                os.close(nothing)
        with contextlib.suppress(OSError):  # Nobody reads it.
            os.write(2, b"the terminal hung up (SIGHUP): the next step is saved, and the run ends\n")
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _check_address(address: str, *, listens: bool) -> None:
    """Raises errors.UserError unless the address can be reached, and if `listens` its port is free here."""
    refused = lambda problem, remedy: errors.UserError(
        problem, field="coordinator_address", value=address, remedy=remedy
    )
    host, colon, port = address.rpartition(":")
    if not colon or not host:
        raise refused("has no port", "give host:port of process 0")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise refused("has no port that exists", "give one from 1 to 65535")
    try:
        found = socket.getaddrinfo(host.removeprefix("[").removesuffix("]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise refused(f"has a host that is not known here ({error})", "give a name or address of process 0") from error
    if listens:
        with socket.socket(found[0][0], socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", int(port)))
            except OSError as error:
                raise refused(
                    f"has a port that process 0 cannot listen at ({error.strerror})", "give all processes another port"
                ) from error


def _meet(given: dict[str, Any]) -> bool:
    """Lets JAX connect the processes of a run; False if nothing says that there are others.

    JAX connects in a thread. It would be deaf to Ctrl-C, and end its own wait by SIGABRT.
    """
    failures: list[Exception] = []
    kept: list[Any] = []

    def connect(kept: list[Any]) -> None:
        try:
            with warnings.catch_warnings():
                # JAX names a package that it would need here to find the others of a Kubernetes job.
                warnings.filterwarnings("ignore", r"\s*Kubernetes\s+environment", UserWarning)
                # If one process fails, it waits this long for the others before it ends them.
                limits = {"initialization_timeout": 2 * _MEETING_SECONDS, "shutdown_timeout_seconds": _SHUTDOWN_SECONDS}
                jax.distributed.initialize(**given, **limits)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=connect, args=(kept,), name="connect", daemon=True)
    thread.start()
    try:
        thread.join(_SAID_AFTER_SECONDS)
        if thread.is_alive():
            print(f"waiting {_awaited(given)}; --num_processes=1 runs alone", file=sys.stderr, flush=True)
        thread.join(_MEETING_SECONDS - _SAID_AFTER_SECONDS)
        if thread.is_alive():
            raise errors.UserError(
                f"waited {_MEETING_SECONDS} seconds {_awaited(given)}",
                remedy=f"start all of them within that time, or {errors.name('num_processes')}=1 to run alone",
            )
    except BaseException:
        # The thread, which never ends, keeps both: JAX would take ten seconds and many lines to end them.
        state = distributed.global_state
        kept += [state.client, state.service]
        state.client = state.service = None
        raise
    return not failures or _stays_alone(failures[0], is_asked=None not in given.values())


def _stays_alone(error: Exception, *, is_asked: bool) -> bool:
    """False where JAX found no other processes. Raises what else went wrong."""
    if not is_asked and "coordinator_address should be defined" in str(error):
        return False
    is_ours = "distributed.initialize" in str(error)  # Called too late, or twice.
    if is_ours or not isinstance(error, (RuntimeError, ValueError, KeyError, OSError)):
        raise error
    # It describes a cluster: its variables, its service for names, its permissions.
    flags = ", ".join(map(errors.name, ("coordinator_address", "num_processes", "process_id")))
    address = distributed.global_state.coordinator_address
    where = "" if address is None else f" at {address}"
    why = [*str(error).strip().splitlines(), type(error).__name__][0]
    raise errors.UserError(
        f"the processes of this run cannot meet{where} ({why})",
        remedy=f"give {flags} by hand, or {errors.name('num_processes')}=1 to run alone",
    ) from error


def _awaited(given: dict[str, Any]) -> str:
    """Where this process waits, and for whom."""
    state = distributed.global_state
    if state.client is None:
        return "for the cluster to say where process 0 is"
    address, number = str(state.coordinator_address), state.num_processes
    said = [f" ({name}={number})" for name in _COUNTS if os.environ.get(name) == str(number)]
    source = said[0] if said and given["num_processes"] is None else ""
    if state.process_id == 0:
        return f"at {address} for {number - 1} of {number} processes{source}"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.removeprefix("[").removesuffix("]"), int(port)), timeout=1).close()
    except OSError as error:
        return f"for process 0 of {number}{source} at {address} ({error.strerror or error})"
    return f"at {address} for others of {number} processes{source}"
