"""Trackers of runs, such as Weights & Biases: a process beside training sends them what the run directory holds."""

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from typing import Any

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.runtime import errors
from sedd_jax.training import tracker_process

_NEW = {"rows": 0, "samples": 0, "steps": {}}
FINISH_SECONDS = 15  # which its process has once training has ended, or was killed
_KILL_AFTER_SECONDS = 2  # more, if it cannot even end itself


def check(config: configs.Config) -> None:
    """Raises errors.UserError if the library of the config's tracker is not installed."""
    name = config.training.tracker
    if name in tracker_process.TRACKERS and not _is_installed(name):
        raise errors.UserError(
            "needs a library that is not installed",
            field="config.training.tracker",
            value=name,
            remedy=f"pip install 'sedd_jax[{name}]'",
        )


def _is_installed(name: str) -> bool:
    # W&B leaves a folder of its name where it was started. Python takes that for a package without a file.
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


class Follower:
    """A process that sends a run to its tracker. Nothing here waits for it but its end, for a bounded time.

    Args:
        run: the run, whose metrics.jsonl exists.
        say: prints a line.
    """

    def __init__(self, run: runs.Run, say: Callable[[str], None]) -> None:
        self._name, self._say, self._is_ending = run.config.training.tracker, say, False
        _identify(run.local / tracker_process.FILE, self._name)
        description = {
            "tracker": self._name,
            "directory": str(run.local.absolute()),
            "finish_seconds": FINISH_SECONDS,
            "name": run.workdir.absolute().name if isinstance(run.workdir, pathlib.Path) else run.workdir.name,
            "config": configs.flatten(configs.to_dict(run.config)),
        }
        # Python finds there what it finds here. A session of its own: Ctrl-C is not meant for it.
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", tracker_process.__name__],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._tell(json.dumps(description))
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> "Follower":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Lets the process send what is left. After some seconds it is killed."""
        self._is_ending = True
        assert self._process.stdin is not None
        if kind is None:
            self._tell("")
        with contextlib.suppress(BrokenPipeError):  # It has failed before, and said so.
            self._process.stdin.close()
        self._listener.join(FINISH_SECONDS + _KILL_AFTER_SECONDS)
        if self._listener.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._listener.join(1)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def _listen(self) -> None:
        """Says what the process says, and where it ends without a word, that it has."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._say(line.decode(errors="replace").rstrip("\n"))
        status = self._process.wait()
        if status in (0, tracker_process.FAILED):
            return
        how = f"did not finish in {FINISH_SECONDS} seconds" if self._is_ending else f"ended with status {status}"
        self._say(f"warning: the tracker {self._name} {how}; metrics.jsonl has everything, the next start sends it")


def follow(run: runs.Run, say: Callable[[str], None]) -> contextlib.AbstractContextManager[object]:
    """A context in which the run goes to its tracker, if it has one that is a library."""
    if run.config.training.tracker not in tracker_process.TRACKERS:
        return contextlib.nullcontext()
    try:
        return Follower(run, say)
    except (OSError, errors.UserError) as error:  # No memory for a process, a damaged file.
        say(f"warning: the tracker {run.config.training.tracker} failed ({error}); the run goes on without it")
        return contextlib.nullcontext()


def _identify(path: pathlib.Path, name: str) -> None:
    """Gives the run an id at the tracker, under which it goes on when it resumes."""
    records = runs.read_json(path) if path.exists() else {}
    if name not in records:
        runs.write_json(path, records | {name: {"id": uuid.uuid4().hex[:8], **_NEW}})
