"""The process that sends a run to its tracker: it follows metrics.jsonl and samples/ in the run directory.

It runs beside training, so that a tracker that is slow, hangs, fails or crashes holds up no step. It imports no JAX.
Training says the lines that it prints; what the tracker's library prints is dropped.
"""

import html
import io
import json
import os
import pathlib
import re
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

FAILED = 3  # exit status of a process that has said why it failed; Python ends with 1
PROJECT = "sedd_jax"
FILE = "tracker.json"  # in the run directory: the run's id at each tracker, and what that has
_SECONDS_BETWEEN_LOOKS = 1.0
_LONGEST = 300  # characters of what a library says
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")


class Wandb:
    """A run at Weights & Biases, which has its own name for each run: an id.

    W&B drops a row whose number is lower than that of the row before. Steps may repeat when a run resumes, so rows are
    counted here, and the step is a metric, which all others are drawn over.
    """

    def __init__(self, given: Mapping[str, Any], record: dict[str, Any]) -> None:
        for name, value in {
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
            "WANDB_DISABLE_GIT": "true",  # The address of a repository may hold a password.
            "WANDB_DISABLE_CODE": "true",
            "WANDB_DIR": given["directory"],
            "WANDB_PROJECT": PROJECT,
            "WANDB_PROGRAM": "sedd train",
            "WANDB__STATS_PID": str(os.getppid()),  # System figures are those of training.
        }.items():
            os.environ.setdefault(name, value)
        import wandb  # pyrefly: ignore[missing-import]

        self._html, self._record = wandb.Html, record
        self._run = wandb.init(id=record["id"], name=given["name"], config=given["config"], resume="allow")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        record["rows"] = max(record.get("rows", 0), self._run.step)
        offline = f"offline, `wandb sync {os.environ['WANDB_DIR']}/wandb/offline-run-*` sends it"
        self.place = self._run.url or offline

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values}, step=self._record["rows"])
        self._record["rows"] += 1

    def write_text(self, step: int, name: str, text: str) -> None:
        self.write(step, {name: self._html(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def finish(self, status: int) -> None:
        self._run.finish(exit_code=status)


class Trackio:
    """A run in Trackio, which continues runs by their names; the id makes the name unique."""

    def __init__(self, given: Mapping[str, Any], record: dict[str, Any]) -> None:
        import trackio  # pyrefly: ignore[missing-import]

        self._markdown = trackio.Markdown
        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{given['name']}-{record['id']}"
        # Where TRACKIO_SPACE_ID names a Space that does not exist yet, Trackio would make a public one.
        self._run = trackio.init(project, name, config=given["config"], resume="allow", private=True, embed=False)
        self.place = f"project {project}, run {name}" + ("" if self._run.url else "; `trackio show` opens it")

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=step)

    def write_text(self, step: int, name: str, text: str) -> None:
        code = textwrap.indent(text, "    ", lambda line: True)
        self.write(step, {name: self._markdown(code)})

    def finish(self, status: int) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Wandb] | type[Trackio]] = {"wandb": Wandb, "trackio": Trackio}


def main() -> int:
    """Sends a run to its tracker until training closes standard input; returns the exit status.

    The first line of standard input describes the run in JSON. An empty line before the end says that training ended
    well.
    """
    # Without a buffer, whose lock a thread that waits would hold when this process ends.
    told = open(0, "rb", buffering=0)  # noqa: SIM115, it stays open
    given = json.loads(told.readline())
    say = _take_output()
    end = _End(told, given["finish_seconds"])
    try:
        _send(given, end, say)
    except Exception as error:
        signal.alarm(given["finish_seconds"])  # Its library may still do something at the end of this process.
        why = _line(f"{type(error).__name__}: {error}")
        say(f"warning: the tracker {given['tracker']} failed ({why}); the run goes on without it")
        return FAILED
    return 0


def _line(said: object) -> str:
    """What a library says, on one line, without the values of environment variables that are keys by their names."""
    text = " ".join(str(said).split())
    secrets = (value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= 8)
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


class _End(threading.Event):
    """Set once training has ended, or was killed. From then on this process has some seconds to end, too.

    Attributes:
        status: 0 if training ended well, else 1.
    """

    def __init__(self, told: io.RawIOBase, seconds: int) -> None:
        super().__init__()
        self.status = 1
        threading.Thread(target=self._wait_for_it, args=(told, seconds), daemon=True).start()

    def _wait_for_it(self, told: io.RawIOBase, seconds: int) -> None:
        self.status = 0 if told.read(1) else 1
        signal.alarm(seconds)
        self.set()


def _take_output() -> Callable[[str], None]:
    """Drops what anything else prints from now on. Returns a function that prints a line."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def say(text: str) -> None:
        print(text, file=ours, flush=True)

    return say


def _send(given: Mapping[str, Any], end: _End, say: Callable[[str], None]) -> None:
    """Writes to the tracker what the run directory holds and the tracker lacks, and whatever comes later."""
    name, directory = given["tracker"], pathlib.Path(given["directory"])
    path = directory / FILE
    records = json.loads(path.read_text(encoding="utf-8"))
    record = records[name]
    warnings.showwarning = lambda message, category, *_, **__: (
        say(f"tracker {name}: {_line(message)}") if category is UserWarning else None
    )
    tracker = TRACKERS[name](given, record)
    say(f"tracker {name}: {tracker.place}")
    with open(directory / "metrics.jsonl", "rb") as file:
        is_last = False
        while not is_last:
            is_last = end.wait(_SECONDS_BETWEEN_LOOKS)
            before = json.dumps(records)
            for line in _new_lines(file):
                _write_new(tracker, record["steps"], line)
            for step, text in _new_samples(directory / "samples", record["samples"]):
                tracker.write_text(step, "samples", text)
                record["samples"] = step
            if json.dumps(records) != before:
                _replace(path, json.dumps(records, indent=2) + "\n")
    tracker.finish(end.status)


def _new_lines(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl that are complete and were not read yet."""
    while (line := file.readline()).endswith(b"\n"):
        yield json.loads(line)
    file.seek(-len(line), os.SEEK_CUR)


def _write_new(tracker: Wandb | Trackio, steps: dict[str, int], line: dict[str, Any]) -> None:
    """Writes the metrics of a line that the tracker does not have yet. A resumed run repeats steps."""
    step = line.pop("step")
    # JSON has no non-finite numbers, they are text.
    new = {name: float(value) for name, value in line.items() if step > steps.get(name, -1)}
    if new:
        tracker.write(step, new)
        steps.update(dict.fromkeys(new, step))


def _new_samples(directory: pathlib.Path, last: int) -> Iterator[tuple[int, str]]:
    """Steps and texts of samples after a step."""
    for path in sorted(directory.glob("[0-9]*.txt")):
        if int(path.stem) > last:
            yield int(path.stem), path.read_text(encoding="utf-8")


def _replace(path: pathlib.Path, text: str) -> None:
    """`storage.replace_text`, whose module imports JAX."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
