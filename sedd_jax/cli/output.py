"""What is printed: for any terminal, and any reader."""

import contextlib
import io
import os
import select
import sys

from sedd_jax.runtime import terminals


class Terminal(io.TextIOWrapper):
    """Standard output at a terminal, which shows control characters and does not obey them."""

    def write(self, text: str, /) -> int:
        return super().write(text.translate(terminals.VISIBLE_CONTROLS))


def prepare() -> None:
    """Lets any text be printed: characters that a terminal lacks are escaped, and a closed output takes nothing.

    Where standard input, output or error is closed, the next file that is opened would take its number.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115, they stay open.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
        if sys.stdout.isatty():
            encoding = sys.stdout.encoding
            sys.stdout = Terminal(sys.stdout.detach(), encoding, "backslashreplace", line_buffering=True)


def say(text: str) -> None:
    """Prints a line to standard error, control characters visible at a terminal. Its reader may have gone."""
    with contextlib.suppress(OSError):
        print(text.translate(terminals.VISIBLE_CONTROLS) if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as `head` does not after its lines."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def finish() -> str | None:
    """Writes what was printed, once; why it cannot be written, or None if it can or nobody wants it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        wanted = not reader_is_gone()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try again at its end.
        return error.strerror if wanted else None
    return None
