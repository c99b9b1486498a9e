"""One owner at a time for a directory that is being made or trained, also where the system keeps no locks.

A local directory has a lock (`locks`). In a bucket, and on a network file system without locks, its owner writes a file
and renews it every few seconds. Who finds such a file waits: if it changes, the owner lives; if it stays as it is, the
owner is dead. No clocks are compared. The owner of a file that another process has taken over ends at once.
"""

import contextlib
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator

from sedd_jax.runtime import locks, storage

RENEWED_SECONDS = 20.0
# A file that does not change for so long has no owner.
PATIENCE_SECONDS = 90.0
# Who starts at the same moment has written by then; the last one that wrote owns the directory.
SETTLED_SECONDS = 2.0


@contextlib.contextmanager
def owned(directory: storage.Directory, field: str) -> Iterator[None]:
    """Owns a directory, which need not exist yet.

    A lock ends with this process, however that ends. A file stays after a hard kill: on the same machine the next owner
    sees that the process is gone, on another one it waits for `PATIENCE_SECONDS`.

    Where nothing may be written beside a local directory, there is no protection.

    Args:
        directory: the directory, local or in a bucket.
        field: the input that names it, for the error.

    Raises:
        errors.UserError: if another process owns it; names the process, its host, and since when.
    """
    with contextlib.ExitStack() as stack:
        unlocked = stack.enter_context(locks.owned(storage.local_copy(directory), field))
        if storage.is_remote(directory):
            stack.enter_context(_leased(directory / locks.INSIDE, directory, field))
        elif unlocked is not None:
            stack.enter_context(_leased(unlocked, directory, field))
        yield


@contextlib.contextmanager
def _leased(file: storage.Directory, directory: storage.Directory, field: str) -> Iterator[None]:
    ours = f"{locks.this_process()}\n{_machine()} {os.getpid()}\n"
    _wait_for_no_owner(file, directory, field)
    storage.put_text(file, f"{ours}0\n")
    time.sleep(SETTLED_SECONDS)
    _check_ours(file, ours, directory, field)
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(file, ours, directory, ended), name="owner", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        with contextlib.suppress(OSError):  # A bucket out of reach: the next owner waits.
            if (storage.get_text(file) or "").startswith(ours):
                storage.remove(file)


def _wait_for_no_owner(file: storage.Directory, directory: storage.Directory, field: str) -> None:
    """Returns when nobody owns the directory; raises errors.UserError if somebody does."""
    found = storage.get_text(file)
    if not found or _is_dead(found):
        return
    print(
        f"{directory} may be in use by {_who(found)}: this takes up to {PATIENCE_SECONDS:.0f} seconds to see",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(RENEWED_SECONDS / 4)
        new = storage.get_text(file)
        if not new:
            return
        if new != found:
            raise locks.in_use(_who(new), directory, field)


def _check_ours(file: storage.Directory, ours: str, directory: storage.Directory, field: str) -> None:
    found = storage.get_text(file)
    if found and not found.startswith(ours):
        raise locks.in_use(_who(found), directory, field)


def _renew(file: storage.Directory, ours: str, directory: storage.Directory, ended: threading.Event) -> None:
    """Writes the file again and again, and ends this process once it is another's."""
    count = 0
    while not ended.wait(RENEWED_SECONDS):
        count += 1
        try:
            found = storage.get_text(file)
            if not found or found.startswith(ours):
                storage.put_text(file, f"{ours}{count}\n")
                continue
        except OSError:
            continue  # Out of reach for now. If that lasts, another process may become the owner.
        said = f"{directory} was taken over by {_who(found)}, which saw no sign of this process"
        print(f"{said} for {PATIENCE_SECONDS:.0f} seconds: it ends", file=sys.stderr, flush=True)
        os._exit(1)


def _is_dead(found: str) -> bool:
    """Whether the owner was a process of this machine that is gone."""
    machine, _, pid = "".join(found.splitlines()[1:2]).rpartition(" ")
    if not machine or machine != _machine():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # Another user's process.
        return False
    return False


def _who(found: str) -> str:
    return found.splitlines()[0]


def _machine() -> str:
    """This boot of this machine, and the container in which processes have the same numbers; "" where unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
