"""Where a process ends without a word, a shell says the last ones."""

import signal
import subprocess
import sys

import pytest

CHILD = """
import os, sys
from sedd_jax.runtime import last_words

last_words.begin()
last_words.leave(lambda: "the newest checkpoint is of step 4; it's 100% \\\\n saved")
{end}
"""
WORDS = (
    "sedd: this process was killed, or ended because another one died: the newest checkpoint is of step 4; "
    "it's 100% \\n saved\n"
)


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("os.abort()", -signal.SIGABRT, WORDS),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, WORDS),
        ("sys.exit(3)", 3, ""),
        ("", 0, ""),
    ],
)
def test_only_a_process_that_does_not_come_to_its_end_has_last_words(end, status, said):
    done = subprocess.run([sys.executable, "-c", CHILD.format(end=end)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (status, said)


def test_signals_to_the_whole_group_do_not_silence_it():
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            CHILD.format(end="import signal; signal.signal(2, signal.SIG_IGN); os.killpg(0, 2); os.abort()"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.communicate(timeout=60)[1].endswith(WORDS)


def test_without_a_shell_nothing_is_said_and_nothing_fails(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = subprocess.run([sys.executable, "-c", CHILD.format(end="os.abort()")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGABRT, "")
