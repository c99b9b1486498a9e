"""The one error for what a user did wrong. The command line, the page and Python each spell the names of inputs."""

import difflib
import errno
import re
from collections.abc import Callable, Iterable
from typing import Any

# Private characters of Unicode, so that no message holds them by accident.
_OPEN, _CLOSE = "\ue000", "\ue001"
_LONGEST = 2000  # characters of a problem
# What to do about what the operating system refuses.
_REMEDIES = {
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its owner, or name another place",
    errno.EROFS: "name another place",
    errno.ENOSPC: "make room there, or name another place",
    errno.EDQUOT: "make room there, or name another place",
    errno.EIO: "its disk or network fails, so name another place",
}
_NAME = re.compile(f"{_OPEN}(.*?){_CLOSE}")


def name(field: str) -> str:
    """The name of an input inside a message, which is spelled as its reader gives it: --data, or data."""
    return f"{_OPEN}{field}{_CLOSE}"


class UserError(ValueError):
    """An input that cannot be used: which one, its value, what is wrong with it, and what to do.

    `str(error)` words it for Python; `worded` lets the command line and the page spell names in their own way.

    Attributes:
        problem: what is wrong, as the rest of a sentence that starts with the input.
        field: the input: an argument, or a field such as config.data.length; "" where the problem names its subject.
        value: what was given; None if there is nothing to show.
        remedy: what to do about it.
        place: where it was found, such as a file and its line.
    """

    def __init__(self, problem: str, *, field: str = "", value: Any = None, remedy: str = "", place: str = ""):
        super().__init__(problem)
        self.problem, self.field, self.value, self.remedy, self.place = problem, field, value, remedy, place

    def __str__(self) -> str:
        return self.worded(lambda field: field)

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers of `sedd prepare` send theirs to the process that started them.
        return _rebuild, (type(self), dict(vars(self)))

    def at(self, place: str) -> "UserError":
        """The same error with a place in front of it."""
        return _rebuild(type(self), vars(self) | {"place": f"{place}: {self.place}" if self.place else place})

    def worded(self, spell: Callable[[str], str]) -> str:
        """The whole message on one line, the names of inputs as `spell` gives them."""
        subject = name(self.field) if self.field else ""
        if subject and self.value is not None:
            subject += f"={_shown(self.value)}"
        text = " ".join(part for part in (self.place and f"{self.place}:", subject, self.problem) if part)
        if len(text) > _LONGEST:  # A value of a foreign file may be of any length.
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        text = f"{text}: {self.remedy}" if self.remedy else text
        return " ".join(_NAME.sub(lambda found: spell(found[1]), text).split())


def reason(error: OSError) -> str:
    """What the system refused, with the path where it names one."""
    found = error.strerror or str(error)
    return f"{error.filename}: {found}" if error.filename else found


def refused(error: OSError) -> str:
    """What the system refused, on one line; where it names a path, with what to do about it."""
    remedy = _REMEDIES.get(error.errno or 0) if error.filename else None
    return " ".join(f"{reason(error)}: {remedy}".split() if remedy else reason(error).split())


def nearest(given: str, known: Iterable[str]) -> str:
    """A question for the start of a remedy, such as "did you mean 'quickstart'? "; "" where nothing is near."""
    found = difflib.get_close_matches(given, list(known), n=1)
    return f"did you mean {found[0]!r}? " if found else ""


def _rebuild(kind: type[UserError], fields: dict[str, Any]) -> Any:
    error = kind(fields["problem"])
    vars(error).update(fields)
    return error


def _shown(value: Any) -> str:
    """Text as it is, in quotes where it is empty or holds spaces; anything else as `str` gives it."""
    return repr(value) if isinstance(value, str) and (not value or value.split() != [value]) else str(value)
