"""File operations of the package that fail on purpose, one at a time."""

import builtins
import contextlib
import io
import os
import pathlib
import sys
import sysconfig

import etils
import numpy

import sedd_jax

_PACKAGE = str(pathlib.Path(sedd_jax.__file__).parent)
# Frames of these do what the package asks of them: what fails there was called by the frame before.
_PASSED_THROUGH = (str(pathlib.Path(numpy.__file__).parent), *etils.__path__, "<frozen", __file__)
_LIBRARIES, _STANDARD = sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")  # the former lies in the latter
_EVENTS = {"open": "open", "os.mkdir": "mkdir", "os.rename": "rename"}


class Faults:
    """Records the operations on files below a directory, and lets one of them fail.

    Attributes:
        root: the directory.
        calls: (kind, path) of each operation so far: "open", "mkdir", "rename" or "write".
        failing: the number of the operation that fails; None for none of them.
        code: the error of the system, such as errno.ENOSPC.
    """

    def __init__(self, root: pathlib.Path, failing: int | None = None, code: int = 0) -> None:
        self.root, self.failing, self.code = f"{root}{os.sep}", failing, code
        self.calls: list[tuple[str, str]] = []

    def call(self, kind: str, path: object) -> None:
        """Counts an operation if it is the package's, and raises if it is the one that fails."""
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not name.startswith(self.root) or not _is_of_package(sys._getframe(2)):
            return
        self.calls.append((kind, name))
        if len(self.calls) - 1 == self.failing:
            raise OSError(self.code, os.strerror(self.code), name)


def _is_of_package(frame) -> bool:
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            return True
        is_standard = name.startswith(_STANDARD) and not name.startswith(_LIBRARIES)
        if not is_standard and not name.startswith(_PASSED_THROUGH):
            return False
        frame = frame.f_back
    return False


_active: Faults | None = None
_is_hooked = False


def _hook(event: str, args: tuple) -> None:
    if _active is not None and event in _EVENTS:
        _active.call(_EVENTS[event], args[0])


@contextlib.contextmanager
def watched(faults: Faults):
    """A context in which `faults` sees the operations. Python cannot remove the hook, which then does nothing."""
    global _active, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hook)
        _is_hooked = True
    opened = io.open

    def open_watched(path, mode="r", *args, **options):
        file = opened(path, mode, *args, **options)
        if set(mode) & set("wax+"):
            for name in ("write", "writelines"):
                setattr(file, name, _watched_write(faults, path, getattr(file, name)))
        return file

    builtins.open = io.open = open_watched
    _active = faults
    try:
        yield
    finally:
        _active = None
        builtins.open = io.open = opened


def _watched_write(faults, path, write):
    def watched_write(data):
        faults.call("write", path)
        return write(data)

    return watched_write
