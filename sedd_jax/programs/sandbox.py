"""Runs untrusted Python programs, each in a process that can compute and do nothing else. Linux only.

A fresh interpreter imports the modules that programs usually need and limits its memory. Then the kernel refuses every
system call that is not in `_ALLOWED`. So a program cannot open files or connections, start processes or threads, or
send signals, neither from Python nor from machine code. The process that started it measures its time and kills it.
"""

import codecs
import contextlib
import ctypes
import encodings.aliases
import enum
import functools
import importlib
import importlib.util
import json
import os
import pkgutil
import platform
import re
import resource
import secrets
import select
import signal
import struct
import subprocess
import sys
import time
import types
from typing import Any, NamedTuple

MEMORY = 512 * 2**20  # bytes of address space
_PATIENCE = 30.0  # seconds for the interpreter to start, on a busy machine
# Modules that programs may import. They are imported first, since no file can be read afterwards.
_MODULES = (
    "__future__ _strptime abc array ast base64 bisect calendar cmath collections collections.abc copy dataclasses "
    "datetime decimal enum fractions functools hashlib heapq io itertools json math numbers operator queue random re "
    "shutil statistics string textwrap time traceback types typing unicodedata unittest zlib"
)
# These are imported for programs in which the first part of their name is a word.
_MODULES_IF_NAMED = (
    "argparse asyncio atexit binascii bz2 cmd codecs colorsys concurrent.futures configparser contextlib "
    "contextvars csv ctypes difflib dis doctest email.message email.mime.text email.parser email.policy fnmatch gc "
    "getopt gettext glob graphlib gzip hmac html.parser inspect ipaddress keyword linecache locale logging.handlers "
    "lzma multiprocessing numpy.char numpy.ctypeslib numpy.dtypes numpy.exceptions numpy.fft numpy.linalg numpy.ma "
    "numpy.polynomial numpy.random numpy.rec numpy.strings numpy.testing numpy.typing os pathlib "
    " pickle pickletools platform pprint reprlib sched secrets selectors shlex signal socket sqlite3 "
    "stringprep struct subprocess symtable sys tempfile threading timeit token tokenize tomllib tracemalloc "
    "unittest.mock urllib.parse uuid warnings weakref xml.dom.expatbuilder xml.dom.minidom xml.etree.ElementTree "
    "zipfile zoneinfo"
)
_SINGLE_THREADED = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # of NumPy
_WORD = re.compile(r"[^\W\d]\w*")
_QUOTED = re.compile(r"""["']([\w./+-]{1,40})["']""")
_BEGINS = b"."  # What the process writes before the program runs.
PART = b"."  # What a driver tells when a part has ended.
_PLAIN = "def drive(program, given, tell):\n    program()\n"
_SIGN = 32  # characters
_SIZES = struct.Struct("<QQQ")  # of what is needed, the program and the driver
# Numbers of the allowed system calls, by machine. In order: read write close fstat lseek, mmap mprotect munmap brk
# mremap madvise, rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack, getpid gettid futex sched_yield, clock_gettime
# clock_nanosleep getrandom, exit exit_group.
_ALLOWED = {
    "x86_64": (0, 1, 3, 5, 8, 9, 10, 11, 12, 25, 28, 13, 14, 15, 131, 39, 186, 202, 24, 228, 230, 318, 60, 231),
    "aarch64": (63, 64, 57, 80, 62, 222, 226, 215, 214, 216, 233, 134, 135, 139, 132, 172, 178, 98, 124, 113, 115, 278,
                93, 94),
}  # fmt: skip
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as the kernel numbers them
_SECCOMP = {"x86_64": 317, "aarch64": 277}  # number of the system call that installs a filter
_SET_FILTER, _OF_ALL_THREADS = 1, 1
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # _REFUSE makes the call fail with EPERM


class Outcome(enum.StrEnum):
    """How a program ended."""

    PASSED = "passed"
    FAILED = "failed"
    TIMED_OUT = "timed out"


class Driver(NamedTuple):
    """Python source that runs a program and sees what it does, in the same process but in a namespace of its own.

    Attributes:
        source: source with a function `drive(program, given, tell)`. It gets a function that runs the program and
            returns its names, the bytes `given`, and a function that sends bytes to the process outside.
        given: bytes for it.
        needs: what it needs beside what the program names, see `needs`.
        parts: seconds for each part. It tells `PART` when one has ended.
        most: how many bytes it may tell after that.
        memory: bytes of address space for both.
    """

    source: str = _PLAIN
    given: bytes = b""
    needs: frozenset[str] = frozenset()
    parts: tuple[float, ...] = ()
    most: int = 0
    memory: int = MEMORY


class Ended(NamedTuple):
    """How a program ended, how many parts had ended before, and what its driver told after them."""

    outcome: Outcome
    num_parts: int
    told: bytes


def check() -> None:
    """Tries an empty program.

    Raises:
        errors.UserError: where programs cannot be confined: on another system, or under a kernel without the filter.
    """
    from sedd_jax.runtime import errors  # Not at the top: the process that is confined runs this file by itself.

    if sys.platform != "linux" or platform.machine() not in _ALLOWED:
        raise errors.UserError(
            f"programs are run on Linux on {' or '.join(_ALLOWED)} only, not on {sys.platform} {platform.machine()}",
            remedy="measure there",
        )
    if run("pass", timeout_s=_PATIENCE) != Outcome.PASSED:
        raise errors.UserError("an empty program does not pass in the sandbox", remedy="try another machine")


def run(program: str, *, timeout_s: float = 3.0) -> Outcome:
    """Runs a program. It passes if it reaches its end, and fails if it raises, exits, or takes too much memory.

    Args:
        program: Python source.
        timeout_s: seconds of wall clock after which the program is killed, whatever it does with signals.

    Raises:
        errors.UserError: where the process ends before the program begins, or does not begin.
    """
    return drive(program, Driver(), timeout_s=timeout_s).outcome


def drive(program: str, driver: Driver, *, timeout_s: float) -> Ended:
    """Runs a program under a driver. It passes if the driver reaches its end in time.

    After the driver has ended, the process writes a secret that it got before. Meanwhile no object of Python holds
    the secret: it waits in a buffer of the C library. A program could make the library write it by a call of its
    functions, or look for it in memory; code that a language model writes does not.

    Args:
        program: Python source.
        driver: what runs it.
        timeout_s: seconds of wall clock for all, after which the process is killed, whatever it does with signals.

    Raises:
        errors.UserError: where the process ends before the program begins, or does not begin.
    """
    from sedd_jax.runtime import errors

    sign = secrets.token_hex(_SIGN // 2).encode()
    found = importlib.util.find_spec("numpy")
    packages = os.path.dirname(os.path.dirname(found.origin)) if found and found.origin else ""
    texts = [text.encode("utf-8", "replace") for text in (json.dumps(sorted(needs(program) | driver.needs)), program)]
    sent = [*texts, driver.source.encode(), driver.given]
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", __file__, str(os.getpid()), packages, str(driver.memory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=_SINGLE_THREADED,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        answer = process.stdout.fileno()
        try:
            # A process that has ended takes nothing. Below it is seen not to begin.
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(sign + _SIZES.pack(*map(len, sent[:-1])))
                for part in sent:
                    pipe.write(part)
            if not _told_within(answer, _PATIENCE) or os.read(answer, len(_BEGINS)) != _BEGINS:
                raise errors.UserError(
                    f"the sandbox did not begin within {_PATIENCE:.0f} s, or ended before",
                    remedy="try a machine that is less busy, and whose kernel lets a process filter its system calls "
                    "(seccomp)",
                )
            told, is_over = _heard(process, answer, driver, timeout_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    num_parts = len(told[: len(driver.parts)]) - len(told[: len(driver.parts)].lstrip(PART))
    if not is_over:
        return Ended(Outcome.TIMED_OUT, num_parts, b"")
    is_signed = told.endswith(sign) and len(told) >= len(sign) + num_parts and num_parts == len(driver.parts)
    said = told[num_parts : -len(sign)] if is_signed else b""
    is_passed = process.returncode == 0 and is_signed and len(said) <= driver.most
    return Ended(Outcome.PASSED, num_parts, said) if is_passed else Ended(Outcome.FAILED, num_parts, b"")


def needs(text: str) -> frozenset[str]:
    """The modules, encodings and time zones that a program may ask for by what it names, each after its kind."""
    words, quoted = {match[0] for match in _WORD.finditer(text)}, {match[1] for match in _QUOTED.finditer(text)}
    found = {f"module {name}" for name in _MODULES_IF_NAMED.split() if name.partition(".")[0] in words}
    found |= {f"encoding {name}" for name in quoted if encodings.normalize_encoding(name).lower() in _encodings()}
    if "zoneinfo" in words:
        import zoneinfo

        found |= {f"zone {name}" for name in quoted & zoneinfo.available_timezones()}
    return frozenset(found)


@functools.cache
def _encodings() -> frozenset[str]:
    """The names of all encodings."""
    modules = {module.name for module in pkgutil.iter_modules(encodings.__path__)}
    return frozenset(modules | set(encodings.aliases.aliases))


def _told_within(answer: int, seconds: float) -> bool:
    """Waits until there is something to read from a pipe, or it is closed; False after so many seconds."""
    waiting = select.poll()
    waiting.register(answer, select.POLLIN)
    return bool(waiting.poll(max(0.0, 1000 * seconds)))


def _heard(process: "subprocess.Popen[bytes]", answer: int, driver: Driver, timeout_s: float) -> tuple[bytes, bool]:
    """Listens until the process ends; what it told, and whether it ended in time.

    A program that tells more than it may is not listened to any more. So it blocks until its time is up.
    """
    deadline = time.monotonic() + timeout_s
    most = len(driver.parts) + driver.most + _SIGN + 1
    ends, told = deadline, bytearray()
    num_ended = -1
    while len(told) < most:
        if num_ended < len(told) <= len(driver.parts):
            num_ended = len(told)
            left = driver.parts[num_ended:][:1]
            ends = min(deadline, time.monotonic() + left[0]) if left else deadline
        if not _told_within(answer, ends - time.monotonic()):
            return bytes(told), False
        read = os.read(answer, min(2**20, most - len(told)))
        if not read:
            break
        told += read
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return bytes(told), False
    return bytes(told), True


def _child(parent: int, packages: str, memory: int) -> None:
    """Reads a program from standard input, confines the process, and runs the program.

    Args:
        parent: the process that started this one, which ends with it.
        packages: the directory that holds NumPy; "" if there is none.
        memory: bytes of address space.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # It died before it could be watched.
    answer = os.dup(1)
    needed, program, driver, given = _received(answer)
    sys.path.append(packages)
    zones = _imported(json.loads(needed))
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (most, most))
    # Classes of a program are found in this module, by pickle for example.
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    names: dict[str, Any] = {}
    _refuse_system_calls(libc)
    os.write(answer, _BEGINS)
    try:
        exec(compile(driver, "driver", "exec"), names)
        names["drive"](functools.partial(_run, program, vars(main)), given, functools.partial(_tell, answer))
    except BaseException:
        os._exit(1)  # Without what the C library holds back.
    del zones
    ctypes.CDLL(None).exit(0)


def _run(program: bytes, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(program, "program", "exec"), names)
    return names


def _tell(answer: int, said: bytes) -> None:
    left = memoryview(said)
    while left:
        left = left[os.write(answer, left) :]


def _received(answer: int) -> list[bytes]:
    """Reads the secret, what is needed, the program, its driver and what that is given.

    The secret goes into a buffer of the C library, written when that exits.
    """
    libc = ctypes.CDLL(None)
    libc.fdopen.restype, libc.fputs.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_void_p]
    pipe = sys.stdin.buffer
    libc.fputs(pipe.read(_SIGN), libc.fdopen(answer, b"w"))
    return [*map(pipe.read, _SIZES.unpack(pipe.read(_SIZES.size))), pipe.read()]


def _imported(needed: list[str]) -> list[object]:
    """Imports what a program may need: some modules always, and others, encodings and time zones that it names.

    Returns:
        The time zones.
    """
    for module in _MODULES.split():
        importlib.import_module(module)
    codecs.lookup("punycode")  # for idna
    zones: list[object] = []
    for kind, _, name in (need.partition(" ") for need in needed):
        if kind == "module":
            with contextlib.suppress(ImportError):  # The program's own import fails, too.
                importlib.import_module(name)
        elif kind == "encoding":
            with contextlib.suppress(LookupError):  # It is of another system.
                codecs.lookup(name)
        else:
            import zoneinfo

            zones.append(zoneinfo.ZoneInfo(name))
    return zones


def _refuse_system_calls(libc: ctypes.CDLL) -> None:
    """Installs the filter of system calls, which cannot be removed.

    Raises:
        OSError: where the kernel does not accept it.
    """
    allowed, instruction = _ALLOWED[platform.machine()], struct.Struct("HBBI").pack
    program = [
        instruction(_LOAD, 0, 0, 4),  # load the architecture of the call
        instruction(_JUMP_IF_EQUAL, 1, 0, _ARCHITECTURE[platform.machine()]),
        instruction(_RETURN, 0, 0, _REFUSE),
        instruction(_LOAD, 0, 0, 0),  # load the number of the call
        *(instruction(_JUMP_IF_EQUAL, len(allowed) - place, 0, number) for place, number in enumerate(allowed)),
        instruction(_RETURN, 0, 0, _REFUSE),
        instruction(_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(program))
    filter_program = struct.pack("HP", len(program), ctypes.addressof(code))
    number, pointer = _SECCOMP[platform.machine()], ctypes.c_char_p(filter_program)
    for failed in (
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        libc.syscall(number, _SET_FILTER, _OF_ALL_THREADS, pointer),
    ):
        if failed:
            raise OSError("the kernel does not accept the filter of system calls")


if __name__ == "__main__":
    _child(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
