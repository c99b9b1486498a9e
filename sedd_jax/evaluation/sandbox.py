"""Runs untrusted Python programs, each in a process that can compute and do nothing else. Linux only.

A fresh interpreter imports the modules that programs usually need and limits its memory. Then the kernel refuses every
system call that is not in `_ALLOWED`. So a program cannot open files or connections, start processes or threads, or
send signals, neither from Python nor from machine code. The process that started it measures its time and kills it.
"""

import codecs
import contextlib
import ctypes
import enum
import importlib
import importlib.util
import os
import platform
import re
import resource
import secrets
import select
import signal
import struct
import subprocess
import sys
import types

_MEMORY = 512 * 2**20  # bytes of address space
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
    "lzma multiprocessing numpy.fft numpy.linalg numpy.polynomial numpy.random numpy.testing numpy.typing os "
    "pathlib pickle pickletools platform pprint reprlib sched secrets selectors shlex signal socket sqlite3 "
    "stringprep struct subprocess symtable sys tempfile threading timeit token tokenize tomllib tracemalloc "
    "unittest.mock urllib.parse uuid warnings weakref xml.dom.expatbuilder xml.dom.minidom xml.etree.ElementTree "
    "zipfile zoneinfo"
)
_SINGLE_THREADED = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # of NumPy
_QUOTED = re.compile(rb"""["']([\w./+-]{1,40})["']""")
_BEGINS = b"."  # What the process writes before the program runs.
_SIGN = 32  # characters
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

    After the program has ended, the process writes a secret that it got before. Meanwhile no object of Python holds
    the secret: it waits in a buffer of the C library. A program could make the library write it by a call of its
    functions, or look for it in memory; code that a language model writes does not.

    Args:
        program: Python source.
        timeout_s: seconds of wall clock after which the program is killed, whatever it does with signals.

    Raises:
        errors.UserError: where the process ends before the program begins, or does not begin.
    """
    from sedd_jax.runtime import errors

    sign = secrets.token_hex(_SIGN // 2).encode()
    found = importlib.util.find_spec("numpy")
    packages = os.path.dirname(os.path.dirname(found.origin)) if found and found.origin else ""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", __file__, str(os.getpid()), packages],
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
                pipe.write(sign + program.encode("utf-8", "replace"))
            waiting = select.poll()
            waiting.register(answer, select.POLLIN)
            if not waiting.poll(1000 * _PATIENCE) or os.read(answer, len(_BEGINS)) != _BEGINS:
                raise errors.UserError(
                    f"the sandbox did not begin within {_PATIENCE:.0f} s, or ended before",
                    remedy="try a machine that is less busy, and whose kernel lets a process filter its system calls "
                    "(seccomp)",
                )
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return Outcome.TIMED_OUT
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        # Read only now: a program that writes a lot blocks until its time is up.
        is_signed = os.read(answer, len(sign) + 1) == sign
        return Outcome.PASSED if status == 0 and is_signed else Outcome.FAILED


def _child(parent: int, packages: str) -> None:
    """Reads a program from standard input, confines the process, and runs the program.

    Args:
        parent: the process that started this one, which ends with it.
        packages: the directory that holds NumPy; "" if there is none.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # It died before it could be watched.
    answer = os.dup(1)
    program = _received(answer)
    zones = _imported(program, packages)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    for kind, most in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (most, most))
    # Classes of a program are found in this module, by pickle for example.
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    _refuse_system_calls(libc)
    os.write(answer, _BEGINS)
    try:
        exec(compile(program, "program", "exec"), vars(main))
    except BaseException:
        os._exit(1)  # Without what the C library holds back.
    del zones
    ctypes.CDLL(None).exit(0)


def _received(answer: int) -> bytes:
    """Reads the secret and the program. The secret goes into a buffer of the C library, written when that exits."""
    libc = ctypes.CDLL(None)
    libc.fdopen.restype, libc.fputs.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_void_p]
    text = sys.stdin.buffer.read()
    libc.fputs(text[:_SIGN], libc.fdopen(answer, b"w"))
    return text[_SIGN:]


def _imported(program: bytes, packages: str) -> list[object]:
    """Imports what a program may need: modules, encodings and time zones that it names. Returns the time zones."""
    words = {word.decode() for word in re.findall(rb"\w+", program)}
    sys.path.append(packages)
    for module in _MODULES.split():
        importlib.import_module(module)
    for module in _MODULES_IF_NAMED.split():
        if module.partition(".")[0] in words:
            with contextlib.suppress(ImportError):  # The program's own import fails, too.
                importlib.import_module(module)
    names = {name.decode() for name in _QUOTED.findall(program)}
    for name in names | {"punycode"}:  # for idna
        with contextlib.suppress(LookupError):  # Most are no encodings.
            codecs.lookup(name)
    zones: list[object] = []
    if "zoneinfo" in words:
        import zoneinfo

        for name in names & zoneinfo.available_timezones():
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
    _child(int(sys.argv[1]), sys.argv[2])
