"""Ctrl-C is never lost: not in a callback of the garbage collector, and not while a library runs an event loop."""

import asyncio
import importlib.machinery
import signal
import subprocess
import sys
import threading

import pytest

from sedd_jax.runtime import interrupts

# A command that says when it begins, and is nearly always in a callback of the garbage collector, as JAX has one.
COMMAND = """
import gc, sys, time
from sedd_jax.cli import main as cli

def work(argv):
    gc.callbacks.append(lambda *_: time.sleep(0.05))
    print("begun", flush=True)
    while True:
        gc.collect()

cli.COMMANDS["sample"] = work
sys.argv = ["sedd", "sample"]
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
cli.run()
"""


def interrupt_once_begun(code):
    """Status, standard output and standard error of a process that gets SIGINT once it says that it has begun."""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    return child.returncode, out, err


@pytest.mark.parametrize("attempt", range(3))
def test_an_interrupt_in_a_callback_of_the_garbage_collector_ends_a_command(attempt):
    assert interrupt_once_begun(COMMAND) == (130, "", "sedd sample: interrupted\n")


# A command that is interrupted inside C++, which makes enumerations while a module of JAX begins.
LOADING = """
import enum, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)
from sedd_jax.cli import main as cli

def work(argv):
    import numpy
    check = enum._is_sunder

    def interrupted(name):
        enum._is_sunder = check
        print("inside", flush=True)
        signal.raise_signal(signal.SIGINT)
        return check(name)

    enum._is_sunder = interrupted
    from jaxlib.mlir._mlir_libs import _mlir
    print("not interrupted")

cli.COMMANDS["sample"] = work
sys.argv = ["sedd", "sample"]
cli.run()
"""


def test_an_interrupt_while_a_native_module_begins_ends_a_command():
    """It aborted the process: an exception in C++ that nothing takes."""
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "inside\n", "sedd sample: interrupted\n")


def test_other_exceptions_that_are_dropped_stay_unsaid(capfd, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for name in ("create_module", "exec_module"):
        loader = importlib.machinery.ExtensionFileLoader
        monkeypatch.setattr(loader, name, getattr(loader, name))
    interrupts.keep()

    class Late:
        def __del__(self):
            raise ValueError("unsaid")

    Late()
    assert "unsaid" not in capfd.readouterr().err


def _interrupted_loop():
    """An event loop that takes an interrupt for itself, as it does if Python's own handler is there."""

    async def work():
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0)
        return "whole"

    return asyncio.run(work())


@pytest.fixture
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_is_deferred_comes_after_the_whole_work(default_handler):
    found = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():  # noqa: PT012
        found.append(_interrupted_loop())
        found.append("and more")
    assert found == ["whole", "and more"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_interrupt_nothing_happens(default_handler):
    with interrupts.deferred():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_are_left_alone(default_handler):
    found = []

    def work():
        with interrupts.deferred():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_an_interrupt_while_the_program_is_loaded_is_one_line():
    code = (
        "import builtins, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "load = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        "    if name == 'absl': signal.raise_signal(signal.SIGINT)\n"
        "    return load(name, *rest)\n"
        "builtins.__import__ = interrupted\n"
        "from sedd_jax import __main__ as program; program.run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "sedd: interrupted\n")


def test_an_interrupt_while_the_program_restarts_itself_waits_until_it_has_begun(tmp_path):
    """It ended Python's own start by SIGINT, or with a traceback."""
    code = (
        "import os, pathlib, signal, sys; from sedd_jax.runtime import hosts\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL); hosts.HUGE_PAGES = pathlib.Path(sys.argv[1])\n"
        "os.environ.pop('GLIBC_TUNABLES', None); sys.orig_argv = [sys.executable, '-m', 'sedd_jax', '--version']\n"
        "restart = os.execv\n"
        "os.execv = lambda *given: (os.kill(os.getpid(), signal.SIGINT), restart(*given))\n"
        "hosts.use_huge_pages()"
    )
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never")
    done = subprocess.run([sys.executable, "-c", code, str(pages)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "sedd: interrupted\n")


def test_an_interrupt_in_code_that_was_made_of_text_ends_with_the_same_status(tmp_path):
    """The process ended by SIGINT after its line, if it was started by `python -m`."""
    (tmp_path / "interrupted.py").write_text(
        "import sys; from sedd_jax import __main__ as program; from sedd_jax.cli import main as cli\n"
        "cli.COMMANDS['sample'] = lambda argv: exec('raise KeyboardInterrupt')\n"
        "sys.argv = ['sedd', 'sample']; program.run()"
    )
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "sedd sample: interrupted\n")


def test_processes_that_are_started_never_hear_of_it(default_handler):
    code = "import signal, time; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with pytest.raises(KeyboardInterrupt), interrupts.kept_from_children():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert said == "True\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_interrupt_ends_a_process_whose_devices_still_compute():
    """Python's own end freed what they used, and in one of three cases crashed."""
    code = (
        "import atexit, jax, jax.numpy as jnp; from sedd_jax.runtime import interrupts; jnp.ones(2).sum()\n"
        "atexit.register(print, 'the end of Python'); print('said'); interrupts.end({status})"
    )
    for status, said in ((interrupts.STATUS, "said\n"), (1, "said\nthe end of Python\n")):
        command = [sys.executable, "-c", code.format(status=status)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, said)


# A command that is over; the signal comes while Python takes the modules down.
OVER = """
import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)
from sedd_jax.cli import main as cli

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT):
        print("over", flush=True)
        kill(pid, number)

last = Last()
cli.COMMANDS["sample"] = lambda argv: 0
sys.argv = ["sedd", "sample"]
cli.run()
"""


def test_an_interrupt_after_the_end_leaves_the_status_as_it_is():
    done = subprocess.run([sys.executable, "-c", OVER], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


# C++ that calls Python may drop an interrupt, or turn it into another error. `finally` takes longer than a repetition.
DROPPED = """
import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)
from sedd_jax.cli import main as cli

def work(argv):
    try:
        print("begun", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        {then}
    try:
        time.sleep(60)
    finally:
        time.sleep(2.5)
        print("cleaned up", flush=True)

cli.COMMANDS["sample"] = work
sys.argv = ["sedd", "sample"]
cli.run()
"""


@pytest.mark.parametrize(
    ("then", "printed"),
    [("pass", "cleaned up\n"), ("raise RuntimeError", ""), ("raise cli.errors.UserError('no', remedy='')", "")],
)
def test_an_interrupt_that_others_drop_comes_again_and_spares_what_cleans_up(then, printed):
    found = interrupt_once_begun(DROPPED.format(then=then))
    assert found == (130, printed, "sedd sample: interrupted\n")
