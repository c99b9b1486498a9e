"""Ctrl-C at moments across the life of each command: it ends soon, with one line and status 130, and no traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from tests.support import forks, hub_emulator, small_runs

# Where tests run in the background SIGINT is ignored, and so it would be in what they start.
LISTENS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
COMMAND = f"{LISTENS}from sedd_jax import __main__ as program; program.run()"
LOADING = 1.0  # seconds, while JAX is loaded
MOMENTS = (0.3, 4.0)  # seconds, of a process that has loaded JAX: while the command begins, while it works
SECONDS = 60  # until it must have ended; a save or the compilation of a program is finished before


def _flags(code_run, place):
    """For each command, flags with which it works for more seconds than the moments."""
    config = configs.flatten(configs.to_dict(runs.load(code_run).config))
    fields = [f"--config.{name}={value}" for name, value in (config | {"training.num_steps": 100_000}).items()]
    alone = "--num_processes=1"
    return {
        "prepare": [
            f"--data=text:{place}/long.txt", "--tokenizer=sentencepiece:300", f"--out={place}/prepared",
            "--num_workers=1",
        ],
        "train": [*fields, f"--workdir={place}/new", alone],
        "sample": [f"--workdir={code_run}", "--num_steps=1000000", alone],
        "eval": [f"--workdir={code_run}", "--num_times=1000000", alone],
        "tune-grid": [f"--workdir={code_run}", "--num_steps=16", alone],
        "serve": [f"--workdir={code_run}", "--port=0"],
        "convert": [f"--from={code_run}", f"--to={place}/converted"],
        "push": [f"--from={code_run}", "--to=ada/model", "--yes"],
        "bench": [*fields, "--repeats=1000"],
        "plan": [*fields, "--topology=v5e:2x2"],
        "doctor": fields,
    }  # fmt: skip


COMMANDS = ("prepare", "train", "sample", "eval", "tune-grid", "serve", "convert", "push", "bench", "plan", "doctor")


@pytest.fixture
def arguments(code_run, tmp_path):
    """(command) -> its arguments."""
    (tmp_path / "long.txt").write_text("".join(f"line {number} of a long text\n" for number in range(1_000_000)))
    return lambda command: [command, *_flags(code_run, tmp_path)[command]]


@pytest.fixture
def slow_hub():
    """A Hub that `sedd push` waits for."""
    with hub_emulator.Server({"hf_x": {"ada"}}, before=lambda *_: time.sleep(30)) as server:
        yield server


def _interrupt(child, command, moment, place):
    try:
        time.sleep(moment)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=SECONDS)
    finally:
        child.kill()
    assert "Traceback" not in err
    # A fast machine may have finished, or refused what it cannot do, before.
    if child.returncode == 130:
        assert err.splitlines()[-1].startswith(("sedd: interrupted", f"sedd {command}: "))
    else:
        assert child.returncode in (0, 1)
        assert "interrupted" not in err
    assert not [name for name in os.listdir(place) if "partial" in name]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "prepare", "plan"])
def test_ctrl_c_ends_a_command_that_is_being_loaded(arguments, tmp_path, command):
    """All commands load the same until JAX is there; `plan` has set variables for it before."""
    started = [sys.executable, "-c", COMMAND, *arguments(command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    _interrupt(subprocess.Popen(started, env=small_runs.environment(), **pipes), command, LOADING, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_ends_a_command_whenever_it_comes(arguments, slow_hub, tmp_path, command, moment):
    variables = small_runs.environment() | slow_hub.environment(str(tmp_path / "home"))
    child = forks.server().start(*arguments(command), env=variables, prelude=LISTENS)
    _interrupt(child, command, moment, tmp_path)
