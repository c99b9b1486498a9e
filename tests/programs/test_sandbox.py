"""Programs in the sandbox can compute; whatever else they try, from Python or by system call, is refused."""

import pathlib
import platform
import subprocess
import sys
import textwrap
import time
import zoneinfo

import numpy as np
import pytest

from sedd_jax.programs import sandbox
from sedd_jax.runtime import errors
from tests.support import places, slow

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
        ("import sedd_jax", FAILED),
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
        "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(6)",
        "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\ntime.sleep(6)",
        "import signal, time\nsignal.signal(signal.SIGALRM, lambda *_: None)\ntime.sleep(6)",
        "import os\nwhile True: os.write(3, b'x' * 1000)",
        "print(1, flush=True)\nwhile True:\n    try:\n        while True: pass\n    except BaseException: pass",
    ],
)
def test_what_never_ends_is_ended(program):
    assert sandbox.run(program, timeout_s=1.0) == TIMED_OUT


def test_a_program_ends_with_the_process_that_started_it():
    """A killed `sedd eval` leaves no program behind, however much time that program has."""
    code = """
        import subprocess
        from sedd_jax.programs import sandbox
        class Shown(subprocess.Popen):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                print(self.pid, flush=True)
        sandbox.subprocess.Popen = Shown
        sandbox.run("while True: pass", timeout_s=600.0)
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as parent:
        status = pathlib.Path(f"/proc/{parent.stdout.readline().strip()}/status")
        wait_until(lambda: "Seccomp:\t2" in status.read_text())
        parent.kill()
    # Where nobody waits for it, it stays as a zombie.
    wait_until(lambda: not status.exists() or "State:\tZ" in status.read_text())


def wait_until(is_so):
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Looks in every frame and in every object for a text or bytes that could be the secret, and writes it.
SEARCH = """
import gc, os, sys
found, frame = gc.get_objects(), sys._getframe()
while frame:
    found += [frame.f_locals, frame.f_globals]
    frame = frame.f_back
found += [value for item in found if isinstance(item, dict) for value in list(item.values())]
found += [value for item in found if isinstance(item, (list, tuple, set)) for value in list(item)]
said = {item.encode() if isinstance(item, str) else item for item in found if isinstance(item, (str, bytes))}
said = {item for item in said if len(item) == 32 and all(chr(byte) in "0123456789abcdef" for byte in item)}
os.write(3, said.pop() if said else b"x" * 32)
os._exit(0)
"""


@pytest.mark.parametrize(
    "program",
    [
        SEARCH,
        "import os\nos.write(3, b'.')\nos._exit(0)",
        "import os\nos.write(1, b'0' * 32)\nos.write(3, b'0' * 32)\nos._exit(0)",
        "raise SystemExit",
        "import sys\nsys._getframe(1).f_globals['os']._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
    ],
)
def test_passing_takes_more_than_a_look_at_frames_and_objects(program):
    assert sandbox.run(program, timeout_s=20.0) == FAILED


NUMPY = """
import numpy as np
assert np.allclose(np.linalg.inv(2 * np.eye(3)) @ np.ones((3, 3)), 0.5)
np.testing.assert_allclose(np.sort(np.random.default_rng(0).normal(size=100))[0], -2.3, atol=1)
"""
PICKLE = """
import dataclasses, pickle
@dataclasses.dataclass
class Point:
    x: int
assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
"""
ZONES = """
import datetime, zoneinfo
noon = datetime.datetime(2024, 7, 1, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Paris"))
assert noon.utcoffset() == datetime.timedelta(hours=2)
"""


@pytest.mark.parametrize(
    "program",
    [
        "import codecs\nassert codecs.encode('abc', 'rot_13') == 'nop'",
        "assert 'é€'.encode('cp1252') == b'\\xe9\\x80'\nassert b'\\x93\\xfa'.decode(\"shift-jis\") == '日'",
        "assert 'bücher.de'.encode('idna') == b'xn--bcher-kva.de'",
        "import graphlib\nassert [*graphlib.TopologicalSorter({1: [2]}).static_order()] == [2, 1]",
        "import sched, time\ns = sched.scheduler()\ns.enter(0.01, 1, print)\ns.run()",
        "import logging, timeit\nlogging.warning(timeit.timeit('1', number=3))",
        "import uuid\nassert uuid.uuid4() != uuid.uuid1()\nuuid.uuid5(uuid.NAMESPACE_DNS, 'a')",
        "import unittest\nfrom unittest import mock\nunittest.main(exit=False, argv=[''])",
        "import xml.etree.ElementTree as ET\nET.fromstring('<a/>')\nfrom concurrent.futures import Future",
        pytest.param(ZONES, marks=pytest.mark.skipif(not zoneinfo.available_timezones(), reason="no time zones here")),
        PICKLE,
        NUMPY,
    ],
)
def test_what_honest_programs_import_works(program):
    assert sandbox.run(program, timeout_s=20.0) == PASSED


def test_every_module_of_the_list_is_there():
    program = "\n".join(f"import {name}" for name in (sandbox._MODULES + " " + sandbox._MODULES_IF_NAMED).split())
    assert sandbox.run(program.replace("import __future__\n", ""), timeout_s=60.0) == PASSED


def test_threads_of_a_library_are_confined_too():
    """Threads that ran before the filter was installed, as linear algebra libraries start them."""
    code = """
        import ctypes, queue, threading
        from sedd_jax.programs import sandbox
        asked, answers = queue.SimpleQueue(), queue.SimpleQueue()
        def serve():
            libc = ctypes.CDLL(None, use_errno=True)
            asked.get()
            answers.put((libc.socket(2, 1, 0), ctypes.get_errno()))
        threading.Thread(target=serve, daemon=True).start()
        sandbox._refuse_system_calls(ctypes.CDLL(None))
        asked.put(1)
        assert answers.get() == (-1, 1)
        import os
        os._exit(0)
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


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


# Each is refused by the system, so none opens the file. What compiles or runs other programs raises before.
NUMPY_FILES = {
    "load": "np.load(path)",
    "load as memory map": "np.load(path, mmap_mode='r')",
    "fromfile": "np.fromfile(path, np.uint8)",
    "memmap": "np.memmap(path, np.uint8, 'r')",
    "memmap to write": "np.memmap(path, np.uint8, 'w+', shape=(4,))",
    "open_memmap": "np.lib.format.open_memmap(path, 'w+', shape=(4,))",
    "loadtxt": "np.loadtxt(path)",
    "genfromtxt": "np.genfromtxt(path)",
    "fromregex": "np.fromregex(path, '(.)', [('x', 'S1')])",
    "tofile": "np.arange(4).tofile(path)",
    "save": "np.save(path, np.arange(4))",
    "savez": "np.savez(path, np.arange(4))",
    "savetxt": "np.savetxt(path, np.arange(4))",
    "dump": "np.arange(4).dump(path)",
    "DataSource": "np.lib.npyio.DataSource('/').open(path)",
    "ctypeslib": "np.ctypeslib.load_library('libc', '/usr/lib')",
    "a C call by ctypeslib": "refused(np.ctypeslib.ctypes.CDLL(None).open(path.encode(), 66, 0o600))",
    "a pointer of an array": "refused(np.ctypeslib.ctypes.CDLL(None).write(1000, np.zeros(9).ctypes.data, 9))",
    "f2py": "__import__('numpy.f2py').f2py.compile('end', extension='.f90')",
    "f2py reading": "__import__('numpy.f2py').f2py.run_main([path])",
    "testing": "np.testing.rundocs(path)",
}


@pytest.mark.parametrize(
    "name", slow.all_but(["load", "fromfile", "memmap", "tofile", "a C call by ctypeslib", "f2py"], NUMPY_FILES)
)
def test_numpy_opens_no_file(tmp_path, name):
    statement = NUMPY_FILES[name]
    path = tmp_path / "array.npy"
    is_read = any(word in statement for word in ("load(", "'r'", "fromfile", "txt(path)", "fromregex", "DataSource"))
    if is_read:
        np.save(path, np.arange(4))
    program = f"""
        import numpy as np
        def refused(found):
            if found == -1:
                raise PermissionError
        path = {str(path)!r}
        try:
            {statement}
        except (OSError, ImportError, AttributeError, SystemExit) as error:
            # It is the system that refuses, not a wrong name.
            assert not isinstance(error, (FileNotFoundError, AttributeError)) or "f2py" in {statement!r}, repr(error)
        else:
            raise AssertionError("it was done")
        """
    assert sandbox.run(textwrap.dedent(program), timeout_s=20.0) == PASSED
    assert path.exists() == is_read


def test_numpy_computes_with_large_arrays_within_the_memory_of_a_driver():
    plain = "def drive(program, given, tell):\n    program()\n"
    program = "import numpy as np\nx = np.empty(2**27)\nx[::2**20] = 1\nassert x[::2**20].sum() == 128\n"
    small, large = sandbox.Driver(plain), sandbox.Driver(plain, memory=2**33)
    assert sandbox.drive(program, small, timeout_s=60.0).outcome == FAILED
    assert sandbox.drive(program, large, timeout_s=60.0).outcome == PASSED


MULTIPLY = """
import numpy as np
a = np.random.default_rng(0).normal(size=(300, 300))
q, r = np.linalg.qr(a)
assert np.ma.allclose(np.ma.array(q @ r), a)
"""


def test_numpy_multiplies_matrices_without_threads():
    assert sandbox.run(MULTIPLY, timeout_s=20.0) == PASSED


DRIVER = """
def drive(program, given, tell):
    names = program()
    for _ in range(names["ticks"]):
        tell(b".")
    names["wait"]()
    tell(given[: names["said"]])
"""


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("ticks, said, wait = 2, 3, lambda: 0", (PASSED, 2, b"abc")),
        ("ticks, said, wait = 2, 0, lambda: 0", (PASSED, 2, b"")),
        ("ticks, said, wait = 1, 0, lambda: 0", (FAILED, 1, b"")),
        ("ticks, said, wait = 2, 3, lambda: 1 / 0", (FAILED, 2, b"")),
        ("ticks, said, wait = 3, 0, lambda: 0", (PASSED, 2, b".")),
        ("ticks, said, wait = 2, 5, lambda: 0", (FAILED, 2, b"")),
        ("import time\nticks, said, wait = 1, 0, lambda: time.sleep(9)", (TIMED_OUT, 1, b"")),
        ("import time\nticks, said, wait = 0, 0, lambda: time.sleep(9)", (TIMED_OUT, 0, b"")),
        ("import time\nticks, said, wait = 2, 2, lambda: time.sleep(1)", (PASSED, 2, b"ab")),
    ],
)
def test_a_driver_tells_how_far_it_came_and_what_it_found(program, ended):
    driver = sandbox.Driver(DRIVER, given=b"abcdefgh", parts=(0.7, 0.7), most=4)
    assert sandbox.drive(program, driver, timeout_s=20.0) == ended


def test_each_part_has_seconds_of_its_own_and_all_have_the_whole():
    source = (
        "import time\ndef drive(program, given, tell):\n    while True:\n        time.sleep(0.2)\n        tell(b'.')\n"
    )
    driver = sandbox.Driver(source, parts=(5.0,) * 100)
    outcome, num_parts, _ = sandbox.drive("", driver, timeout_s=1.5)
    assert outcome == TIMED_OUT
    assert 1 <= num_parts <= 7


def test_megabytes_are_handed_over_as_they_are():
    driver = sandbox.Driver(
        "def drive(program, given, tell):\n    tell(given)\n", given=bytes(range(256)) * 2**16, most=2**25
    )
    outcome, _, told = sandbox.drive("", driver, timeout_s=60.0)
    assert outcome == PASSED
    assert told == driver.given


def test_only_what_a_text_names_is_loaded():
    text = "import numpy as np\n'UTF-16'.encode('latin-1')\n" + repr([f"word{number}" for number in range(1000)])
    found = sandbox.needs(text)
    assert {"module numpy.random", "encoding UTF-16", "encoding latin-1"} <= found
    assert not {need for need in found if "word" in need or "asyncio" in need}
    assert sandbox.needs("'Europe/Paris'") == frozenset()


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
    with pytest.raises(errors.UserError, match="on Linux on x86_64 or aarch64 only, not on linux vax"):
        sandbox.check()
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "__file__", str(places.REPOSITORY / "tests" / "support" / "goldens.py"))
    with pytest.raises(errors.UserError, match="seccomp"):
        sandbox.check()
