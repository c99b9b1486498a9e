"""What is said where a process of many ends without a word: JAX aborts it in C++ once another process has died.

A shell of a few lines holds the words and outlives the process.
"""

import atexit
import shutil
import subprocess
from collections.abc import Callable

# Says the last line that it has read, unless that is empty. Signals to the whole group are not meant for it.
_SPEAKER = """trap '' HUP INT TERM
while IFS= read -r line; do words=$line; done
[ -z "$words" ] || printf '%s\\n' "$words" >&2
"""
_LOST = "sedd: this process was killed, or ended because another one died"
_remedies: list[Callable[[], str]] = [lambda: "start the same command again in all processes"]
_speakers: list[subprocess.Popen[str]] = []


def begin() -> None:
    """Leaves words to be said on standard error if this process does not come to its end by itself.

    Where there is no shell, as in a container of one program, nothing will be said.
    """
    if shutil.which("sh") is None:
        return
    _speakers.append(subprocess.Popen(["sh", "-c", _SPEAKER], stdin=subprocess.PIPE, text=True, start_new_session=True))
    atexit.register(take_back)
    leave(_remedies[0])


def leave(remedy_fn: Callable[[], str]) -> None:
    """Leaves other words on what to do then, which are found now, and again by `remedy`."""
    _remedies[:] = [remedy_fn]
    if _speakers:
        _say(f"{_LOST}: {remedy()}")


def remedy() -> str:
    """What to do once another process has died."""
    return _remedies[0]()


def take_back() -> None:
    """Nothing will be said any more: this process ends by itself."""
    if _speakers:
        _say("")
        _speakers[0].communicate()


def _say(words: str) -> None:
    stream = _speakers[0].stdin
    assert stream is not None
    stream.write(f"{words}\n")
    stream.flush()
