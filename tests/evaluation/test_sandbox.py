"""Programs in the sandbox can compute; whatever else they try, from Python or by system call, is refused."""

import platform
import sys
import textwrap

import pytest

from sedd_jax.evaluation import sandbox
from tests.support import places

PASSED, FAILED, TIMED_OUT = sandbox.Outcome.PASSED, sandbox.Outcome.FAILED, sandbox.Outcome.TIMED_OUT

# Passes where the system call is refused.
REFUSED = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.{call} == -1
assert ctypes.get_errno() == 1, ctypes.get_errno()
"""


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in sandbox._ALLOWED, reason="programs are run on Linux only"
)


def test_programs_can_be_kept_in():
    sandbox.check()


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("import math, hashlib, re, random\nassert math.gcd(4, 6) == 2\nprint('x' * 100_000)\nrandom.random()", PASSED),
        ("from typing import List\nfrom decimal import Decimal\nassert sorted([2, 1]) == [1, 2]\n'é'.encode()", PASSED),
        ("import sys\nprint('é', file=sys.stderr)\nsys.setrecursionlimit(5000)", PASSED),
        ("assert False", FAILED),
        ("a = = 1", FAILED),
        ("\0", FAILED),
        ("from __future__ import annotations\nimport datetime\ndatetime.datetime.strptime('2026', '%Y')", PASSED),
        ("import sys\nsys.exit(0)", FAILED),
        ("import os\nos._exit(0)", FAILED),
        ("import numpy", FAILED),
        ("input()", FAILED),
        ("def f(): return f()\nf()", FAILED),
        ("x = bytearray(2**30)", FAILED),
        ("x = []\nwhile True: x.append(bytearray(2**20))", FAILED),
    ],
)
def test_programs_pass_where_they_come_to_their_end(program, outcome):
    assert sandbox.run(program, timeout_s=20.0) == outcome


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(10)",
        "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass",
        "import os\nwhile True: os.write(3, b'x' * 1000)",
        "print(1, flush=True)\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
)
def test_what_never_ends_is_ended(program):
    assert sandbox.run(program, timeout_s=1.0) == TIMED_OUT


@pytest.mark.parametrize(
    "call",
    [
        "socket(2, 1, 0)",
        "socket(1, 1, 0)",
        "open(b'/etc/hostname', 0)",
        "open(b'/tmp', 0)",
        "open(b'/proc/self/mem', 2)",
        "creat(b'/tmp/sedd_jax_escaped', 0o600)",
        "mkdir(b'/tmp/sedd_jax_escaped', 0o700)",
        "unlink(b'/tmp/sedd_jax_escaped')",
        "chmod(b'/tmp', 0o777)",
        "fork()",
        "kill(1, 0)",
        "ptrace(0, 0, 0, 0)",
        "execve(b'/bin/sh', None, None)",
        "prctl(4, 1, 0, 0, 0)",
        "setuid(0)",
        "mount(None, None, None, 0, None)",
        "memfd_create(b'x', 0)",
    ],
)
def test_system_calls_are_refused(call):
    assert sandbox.run(REFUSED.format(call=call), timeout_s=20.0) == PASSED


def test_a_fork_bomb_starts_nothing():
    bomb = """
        import os, threading
        def tried(start):
            try:
                start()
            except (OSError, RuntimeError):
                return False
            return True
        for _ in range(100):
            assert not tried(os.fork)
            assert not tried(threading.Thread(target=print).start)
        """
    assert sandbox.run("import sys\n" + textwrap.dedent(bomb), timeout_s=20.0) == PASSED


def test_no_file_appears_and_the_environment_stays_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SEDD_SECRET", "1")
    escaped = tmp_path / "escaped"
    write = f"try:\n    open({str(escaped)!r}, 'w')\nexcept PermissionError:\n    pass\nelse:\n    assert False"
    assert sandbox.run(write, timeout_s=20.0) == PASSED
    assert not escaped.exists()
    assert sandbox.run("import os\nassert 'SEDD_SECRET' not in os.environ", timeout_s=20.0) == PASSED
    (tmp_path / "real").write_text("x")
    write = f"import os\ntry:\n    os.remove({str(tmp_path / 'real')!r})\nexcept PermissionError:\n    pass"
    assert sandbox.run(write, timeout_s=20.0) == PASSED
    assert (tmp_path / "real").exists()


def test_descriptors_are_few():
    program = """
        import os
        for number in range(64):
            try:
                os.fstat(number)
            except OSError:
                continue
            assert number < 5, number
        """
    assert sandbox.run(textwrap.dedent(program), timeout_s=20.0) == PASSED


def test_where_nothing_can_be_kept_in_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "vax")
    with pytest.raises(ValueError, match="on Linux on x86_64 or aarch64 only, not on linux vax"):
        sandbox.check()
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "__file__", str(places.REPOSITORY / "tests" / "support" / "goldens.py"))
    with pytest.raises(ValueError, match="seccomp"):
        sandbox.check()
