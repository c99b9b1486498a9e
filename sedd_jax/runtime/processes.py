"""Runs of several processes, each with devices of its own: how they connect, wait for each other and stop."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import jax
from jax._src import distributed  # The key-value store of the processes has no public name.
from jax.experimental import multihost_utils

from sedd_jax.runtime import errors

_PREPARATION_MS = 24 * 60 * 60 * 1000  # The others wait while the first process may tokenize a corpus.
_SHUTDOWN_SECONDS = 60


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Connects this process to the others of a run, if the arguments or the cluster say that there are others.

    Call it before JAX starts. Without arguments JAX detects the cluster (TPU pod, SLURM, GKE). If there is none, or if
    num_processes is 1, the process runs alone.

    Args:
        coordinator_address: host:port of process 0, to which the others connect.
        num_processes: number of processes.
        process_id: number of this process, from 0.

    Raises:
        errors.UserError: if only some of the three are given, or a value is impossible.
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
        if ":" not in coordinator_address:
            raise errors.UserError(
                "has no port",
                field="coordinator_address",
                value=coordinator_address,
                remedy="give host:port of process 0",
            )
        if not 0 <= process_id < num_processes:
            raise errors.UserError(
                f"must be from 0 to {num_processes - 1}, below {errors.name('num_processes')}",
                field="process_id",
                value=process_id,
            )
    try:
        # If one process fails, it waits this long for the others before it ends them.
        jax.distributed.initialize(**given, shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
    except ValueError as error:
        if not missing or "coordinator_address should be defined" not in str(error):
            raise
        return
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
        name: a name for the work, different in every call.
        fn: the work.

    Raises:
        errors.UserError: in the other processes, with the message of the first.
    """
    if jax.process_count() == 1:
        fn()
        return
    client = distributed.global_state.client
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
            client.key_value_set(f"sedd_jax/{name}", f"outcome: {outcome}")
    else:
        told = client.blocking_key_value_get(f"sedd_jax/{name}", _PREPARATION_MS)
        if outcome := str(told).removeprefix("outcome: "):
            raise errors.UserError(f"process 0 says: {outcome}")


def describe() -> str:
    """This process, the number of processes and the host, for messages."""
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[int], bool]]:
    """A function of the step just taken, which returns whether to stop there because SIGTERM has arrived.

    A process that runs alone installs a signal handler, which Python allows only in the main thread. Of several
    processes, any may receive the signal. JAX then chooses one step for all, so each must call the function at every
    step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    told = threading.Event()
    is_told = lambda step: told.is_set()
    if threading.current_thread() is not threading.main_thread():
        yield is_told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield is_told
    finally:
        signal.signal(signal.SIGTERM, before)
