"""Runs untrusted Python programs, each in a process that can compute and do nothing else. Linux only.

A fresh interpreter imports the modules that programs usually need and limits its memory and time. Then the kernel
refuses every system call that is not in `_ALLOWED`. So a program cannot open files or connections, start processes or
threads, or send signals, neither from Python nor from machine code.
"""

import ctypes
import enum
import importlib
import os
import platform
import resource
import secrets
import signal
import struct
import subprocess
import sys

_MEMORY = 512 * 2**20  # bytes of address space
_PATIENCE = 30.0  # seconds for the interpreter to start, on a busy machine
# Modules that programs may import. They are imported first, since no file can be read afterwards.
_MODULES = (
    "__future__ _strptime abc array ast base64 bisect calendar cmath collections collections.abc copy dataclasses "
    "datetime decimal enum fractions functools hashlib heapq io itertools json math numbers operator queue random re "
    "statistics string textwrap time traceback types typing unicodedata unittest zlib"
)
# Numbers of the allowed system calls, by machine. In order: read write close fstat lseek, mmap mprotect munmap brk
# mremap madvise, rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack, getpid gettid futex sched_yield, clock_gettime
# clock_nanosleep getrandom, exit exit_group.
_ALLOWED = {
    "x86_64": (0, 1, 3, 5, 8, 9, 10, 11, 12, 25, 28, 13, 14, 15, 131, 39, 186, 202, 24, 228, 230, 318, 60, 231),
    "aarch64": (63, 64, 57, 80, 62, 222, 226, 215, 214, 216, 233, 134, 135, 139, 132, 172, 178, 98, 124, 113, 115, 278,
                93, 94),
}  # fmt: skip
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as the kernel numbers them
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # _REFUSE makes the call fail with EPERM


class Outcome(enum.StrEnum):
    """How a program ended."""

    PASSED = "passed"
    FAILED = "failed"
    TIMED_OUT = "timed out"


def check() -> None:
    """Raises ValueError where programs cannot be confined: on another system, or under a kernel without the filter."""
    if sys.platform != "linux" or platform.machine() not in _ALLOWED:
        raise ValueError(
            f"programs are run on Linux on {' or '.join(_ALLOWED)} only, not on {sys.platform} {platform.machine()}"
        )
    if run("pass", timeout_s=_PATIENCE) != Outcome.PASSED:
        raise ValueError("this kernel lets no process filter its system calls (seccomp), so no program is run here")


def run(program: str, *, timeout_s: float = 3.0) -> Outcome:
    """Runs a program. It passes if it reaches its end, and fails if it raises, exits, or takes too much memory.

    After the program has ended, the process writes a secret that it got before. A program could look for the secret in
    memory and write it itself; code that a language model writes does not.

    Args:
        program: Python source.
        timeout_s: seconds after which the program is killed.
    """
    sign = secrets.token_hex(16)
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", __file__, str(timeout_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={},
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with process.stdin as pipe:
                pipe.write(sign.encode() + program.encode("utf-8", "replace"))
            process.wait(timeout_s + _PATIENCE)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            process.kill()
        status = process.wait()
        # Read only now: a program that writes a lot blocks until its time is up.
        said = process.stdout.read(len(sign) + 1)
    if status == 0 and said == sign.encode():
        return Outcome.PASSED
    return Outcome.TIMED_OUT if -status in (signal.SIGKILL, signal.SIGALRM, signal.SIGXCPU) else Outcome.FAILED


def _child(timeout_s: float) -> None:
    """Reads a program from standard input, confines the process, and runs the program."""
    text = sys.stdin.buffer.read()
    sign, program = text[:32], text[32:]
    for module in _MODULES.split():
        importlib.import_module(module)
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    seconds = int(timeout_s) + 1
    for kind, most in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    _refuse_system_calls()
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(answer, sign)
    os._exit(0)


def _refuse_system_calls() -> None:
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
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong]
    for call in (
        (_PR_SET_NO_NEW_PRIVS, 1, None, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_program, 0, 0),
    ):
        if prctl(*call):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    _child(float(sys.argv[1]))
