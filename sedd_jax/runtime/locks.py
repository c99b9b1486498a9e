"""One owner at a time for a local directory that is being made or trained."""

import contextlib
import datetime
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import TextIO

from sedd_jax.runtime import errors

INSIDE = ".lock"  # The file in a directory whose parent may not be written, and in a bucket.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def owned(place: pathlib.Path, field: str) -> Iterator[pathlib.Path | None]:
    """Owns a local directory, which need not exist yet. The system ends this with the process, however that ends.

    Gives the file that stands for the directory if its file system has no locks; then, and where nothing may be written
    beside the directory, there is no protection.

    Args:
        place: the directory.
        field: the input that names it, for the error.

    Raises:
        errors.UserError: if another process owns it; names the process, its host, and since when.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_locked(_file_of(place)))
        except BlockingIOError as error:
            raise in_use(error.args[0], place, field) from error
        except OSError as error:
            yield _file_of(place) if error.errno in _NO_LOCKS else None
            return
        with contextlib.suppress(OSError):  # A full disk: the lock holds without the note.
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), this_process().encode())
        yield None


def this_process() -> str:
    """This process as an owner, in words: its number, its host, and the time."""
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {now}"


def in_use(owner: str, place: object, field: str) -> errors.UserError:
    """The error of a directory that another process owns."""
    return errors.UserError(
        f"is in use by {owner or 'another process'}", field=field, value=place, remedy="wait until it ends, or stop it"
    )


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[TextIO]:
    """A file that no other process has locked. Raises BlockingIOError with its content if one has."""
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise BlockingIOError(file.read()) from None
            # An owner removes its file at its end. Who has opened that one begins again.
            if not _is_at(path, file):
                continue
            try:
                yield file
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: pathlib.Path, file: TextIO) -> bool:
    """Whether an open file still has this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _file_of(place: pathlib.Path) -> pathlib.Path:
    """The file that stands for a directory, by whatever name it is given: beside it, or in it where that is closed."""
    place = pathlib.Path(os.path.realpath(place))
    if place.is_dir() and not os.access(place.parent, os.W_OK):
        return place / INSIDE
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.parent / f".{place.name}.lock"
