"""Ctrl-C at moments across the life of each command: it ends soon, with one line and status 130, and no traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from tests.support import small_runs

# Where tests run in the background SIGINT is ignored, and so it would be in what they start.
COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from sedd_jax import __main__ as program; program.run()"
)
MOMENTS = (1.0, 3.0, 8.0)  # seconds: while JAX is loaded, while the command begins, while it works
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
        "bench": [*fields, "--repeats=1000"],
        "plan": [*fields, "--topology=v5e:2x2"],
        "doctor": fields,
    }  # fmt: skip


COMMANDS = ("prepare", "train", "sample", "eval", "tune-grid", "serve", "convert", "bench", "plan", "doctor")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_ends_a_command_whenever_it_comes(code_run, tmp_path, command, moment):
    (tmp_path / "long.txt").write_text("".join(f"line {number} of a long text\n" for number in range(1_000_000)))
    arguments = [sys.executable, "-c", COMMAND, command, *_flags(code_run, tmp_path)[command]]
    child = subprocess.Popen(
        arguments, env=small_runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
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
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
