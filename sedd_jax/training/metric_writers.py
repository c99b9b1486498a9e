"""Writers of a run's metrics: metrics.jsonl, TensorBoard event files, and the terminal.

Metrics are a flat dict of Python floats with slash names, such as {"train/loss": 3.2, "valid/score_entropy_bits": 2.9}.
rich, tensorboardX and matplotlib are imported where they are used, because training works without them. Without rich a
run prints plain lines. Without the others it says in one line what it leaves out.
"""

import contextlib
import datetime
import functools
import importlib.util
import io
import json
import math
import os
import pathlib
import sys
import textwrap
import time
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import jax

from sedd_jax.runtime import hosts, metric_lines, terminals


@functools.cache
def say_missing(package: str, loss: str) -> None:
    """Prints once what a run leaves out because `package` is not installed."""
    print(f"{package} is not installed: {loss} (pip install {package})", file=sys.stderr)


def is_missing(package: str) -> bool:
    """Whether a package is not installed."""
    return importlib.util.find_spec(package) is None


def truncate_after(path: str | os.PathLike[str], step: int) -> None:
    """Drops the lines after `step` and an incomplete last line, so that a run resumed at `step` has no step twice."""
    kept = [record for record in metric_lines.read(path) if record["step"] <= step]
    # The file is replaced as a whole: a kill in between leaves the old file or the new one.
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
    os.replace(partial, path)


def holds(path: str | os.PathLike[str], step: int, prefix: str) -> bool:
    """Whether a metrics file has a metric of a step whose name begins so."""
    at_step = [record for record in metric_lines.read(path) if record["step"] == step]
    return any(name.startswith(prefix) for record in at_step for name in record)


class JsonLines:
    """Appends one line {"step": n, name: value, ...} per write and flushes it.

    JSON has no non-finite numbers. They are written as the strings "nan", "inf" and "-inf", so that `float(value)`
    reads every value back.
    """

    def __init__(self, path: str | os.PathLike[str], *, start_step: int) -> None:
        if os.path.exists(path):
            truncate_after(path, start_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, it stays open until close

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _hidden(package: str) -> Generator[None, None, None]:
    """A context in which a package that is not loaded yet cannot be imported."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyrefly: ignore[unsupported-operation], as the import system documents it
    try:
        yield
    finally:
        del sys.modules[package]


class TensorBoard:
    """Writes scalars to an event file. A run resumed at `start_step` hides later steps in earlier event files."""

    def __init__(self, directory: str | os.PathLike[str], *, start_step: int) -> None:
        # It imports PyTorch wherever that is installed, which takes seconds and is of no use here.
        with _hidden("torch"):
            import tensorboardX

        # TensorBoard drops purge_step and all steps after it.
        purge_step = start_step + 1 if start_step > 0 else None
        self._writer = tensorboardX.SummaryWriter(logdir=os.fspath(directory), purge_step=purge_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()

    def write_text(self, step: int, name: str, text: str) -> None:
        # TensorBoard shows Markdown, in which indented lines stay as they are.
        self._writer.add_text(name, textwrap.indent(text, "    ", lambda line: True), global_step=step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Pace:
    """Measures steps per second and the time left, on the monotonic clock."""

    def __init__(self, *, num_steps: int, start_step: int) -> None:
        self._num_steps = num_steps
        self._step = start_step
        self._time = time.monotonic()
        self._paused = 0.0
        self._first_lap: tuple[int, float] | None = None

    @contextlib.contextmanager
    def pause(self) -> Generator[None, None, None]:
        """A context whose time does not count as training: compilation, evaluation, sampling, saving."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def lap(self, step: int) -> tuple[float, float]:
        """Training steps per second since the last lap, and the seconds left until the last step.

        The time left includes pauses, because future pauses will take as long as past ones. It ignores the time before
        the first lap, in which the program compiles.
        """
        now = time.monotonic()
        steps_per_second = (step - self._step) / max(now - self._time - self._paused, 1e-9)
        if self._first_lap is None:
            self._first_lap = (step, now)
            seconds_per_step = 1 / steps_per_second if steps_per_second > 0 else 0.0
        else:
            first_step, first_time = self._first_lap
            seconds_per_step = (now - first_time) / max(step - first_step, 1)
        self._step, self._time, self._paused = step, now, 0.0
        return steps_per_second, seconds_per_step * (self._num_steps - step)


def _short(count: float) -> str:
    """A count in at most five characters: 987, 12.3k, 4.57M."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


class Progress:
    """A progress bar on a terminal, one plain line per call elsewhere.

    Where nobody reads it any more, as when `tee` has ended, or its disk is full, it goes nowhere, and training goes on.

    Args:
        num_steps: the last step of training.
        unit: the unit of bits per unit, "character" or "token".
        start_step: the step at which training starts or resumes.
        stream: where to write; standard error if None.
    """

    def __init__(self, *, num_steps: int, unit: str, start_step: int, stream: io.TextIOBase | None = None) -> None:
        self._num_steps = num_steps
        self._unit = unit
        output: Any = sys.stderr if stream is None else stream
        self._stream = output
        self._live: Any = None
        if self._stream.isatty() and not is_missing("rich"):
            from rich import console, live

            terminal = console.Console(file=output, highlight=False)
            if not terminal.is_dumb_terminal:
                # Other output of the program to the same terminal must appear above the bar, too.
                own = self._stream is sys.stderr
                self._live = live.Live(
                    self._bar(start_step, None, "the first step compiles"),
                    console=terminal,
                    auto_refresh=False,
                    redirect_stderr=own,
                    redirect_stdout=own and sys.stdout.isatty(),
                )
                with contextlib.suppress(OSError):
                    self._live.start(refresh=True)

    def _bar(self, step: int, left: datetime.timedelta | None, numbers: str) -> Any:
        """Two lines, because at 60 columns one line is too short for the numbers and the bar."""
        from rich import console, progress_bar, table, text

        row = table.Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        bar = progress_bar.ProgressBar(total=self._num_steps, completed=step)
        percent = f"{100 * step // max(self._num_steps, 1)}%"
        row.add_row(f"step {step}/{self._num_steps}", bar, percent if left is None else f"{percent}  left {left}")
        return console.Group(row, text.Text(numbers))

    def show(self, step: int, metrics: Mapping[str, float], seconds_left: float) -> None:
        """Shows the progress of the run. `metrics` are those of a training step, with "train/tokens_per_second"."""
        bits = f"bits/{self._unit} {metrics[f'train/bits_per_{self._unit}']:.3f}"
        numbers = [f"loss {metrics['train/loss']:.3f}", bits, f"{_short(metrics['train/tokens_per_second'])} tokens/s"]
        if "train/model_flop_utilization" in metrics:
            numbers.append(f"mfu {metrics['train/model_flop_utilization']:.1%}")
        left = datetime.timedelta(seconds=round(seconds_left))
        if self._live is None:
            self.say("  ".join([f"step {step}/{self._num_steps}", *numbers, f"left {left}"]))
        else:
            with contextlib.suppress(OSError):
                self._live.update(self._bar(step, left, "  ".join(numbers)), refresh=True)

    def say(self, text: str) -> None:
        """Prints a text above the bar, such as samples, a result or a warning."""
        visible = text.translate(terminals.VISIBLE_CONTROLS)
        with contextlib.suppress(OSError):
            if self._live is None:
                print(visible, file=self._stream, flush=True)
            else:
                self._live.console.print(visible, markup=False, emoji=False)

    def close(self) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()


def _describe(metrics: Mapping[str, float]) -> str:
    """Held-out metrics as words: "score entropy bits 2.912 ± 0.014"."""
    parts = []
    for name, value in metrics.items():
        if not name.endswith("_stderr"):
            error = f" ± {metrics[f'{name}_stderr']:.3f}" if f"{name}_stderr" in metrics else ""
            parts.append(f"{name.removeprefix('valid/').replace('_', ' ')} {value:.3f}{error}")
    return "  ".join(parts)


class NoWriter:
    """Writes nothing: the writer of every process but the first."""

    def say(self, text: str) -> None:
        pass

    def pause(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def write_text(self, step: int, name: str, text: str) -> None:
        pass

    def __enter__(self) -> "NoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def _peak_memory() -> dict[str, float]:
    """The most memory used so far, by this process and on any of its devices. CPUs do not say."""
    found = {"system/peak_host_memory_gib": hosts.peak_memory_bytes() / 2**30}
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [known["peak_bytes_in_use"] for known in statistics if "peak_bytes_in_use" in known]
    return found | ({"system/peak_device_memory_gib": max(peaks) / 2**30} if peaks else {})


class Work(NamedTuple):
    """The work of a training step, from which speed and utilization are computed.

    Attributes:
        tokens: tokens in a batch.
        flops_per_token: floating-point operations of the model per trained token.
        peak_flops: floating-point operations per second of all devices at their peak; None if unknown, in which case no
            utilization is written.
    """

    tokens: int
    flops_per_token: float
    peak_flops: float | None


class MetricWriter:
    """Writes metrics to the terminal, to metrics.jsonl, and if asked to tensorboard/ in the run directory.

    Args:
        directory: the run directory.
        num_steps: the last step of training.
        start_step: the step at which training starts or resumes.
        unit: the unit of bits per unit, "character" or "token".
        work: the work of a training step.
        stream: the terminal or another stream; standard error if None.
        tensorboard: whether to write TensorBoard's files.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        num_steps: int,
        start_step: int,
        unit: str,
        work: Work,
        stream: io.TextIOBase | None = None,
        tensorboard: bool = True,
    ) -> None:
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._work = work
        self._files: list[JsonLines | TensorBoard] = [JsonLines(directory / "metrics.jsonl", start_step=start_step)]
        self._board: TensorBoard | None = None
        if tensorboard and is_missing("tensorboardX"):
            say_missing("tensorboardX", "no TensorBoard files, metrics.jsonl holds the same numbers")
        elif tensorboard:
            self._board = TensorBoard(directory / "tensorboard", start_step=start_step)
            self._files.append(self._board)
        self._progress = Progress(num_steps=num_steps, unit=unit, start_step=start_step, stream=stream)
        self._pace = Pace(num_steps=num_steps, start_step=start_step)
        self.say = self._progress.say
        self.pause = self._pace.pause

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of one step everywhere. To those of a training step it adds speed and memory."""
        metrics, seconds_left = dict(metrics), None
        if "train/loss" in metrics:
            steps_per_second, seconds_left = self._pace.lap(step)
            metrics["train/tokens_per_second"] = steps_per_second * self._work.tokens
            if self._work.peak_flops is not None:
                flops = metrics["train/tokens_per_second"] * self._work.flops_per_token
                metrics["train/model_flop_utilization"] = flops / self._work.peak_flops
            metrics |= _peak_memory()
        for file in self._files:
            file.write(step, metrics)
        if seconds_left is not None:
            self._progress.show(step, metrics, seconds_left)
        held_out = {name: value for name, value in metrics.items() if name.startswith("valid/")}
        if held_out:
            self.say(f"step {step}  held out: {_describe(held_out)}")

    def write_text(self, step: int, name: str, text: str) -> None:
        """Writes a text to TensorBoard's files."""
        if self._board is not None:
            self._board.write_text(step, name, text)

    def close(self) -> None:
        self._progress.close()
        for file in self._files:
            file.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


Writer = MetricWriter | NoWriter
