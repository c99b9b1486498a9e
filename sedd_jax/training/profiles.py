"""Profiles of training: a trace of some steps, and a table of its kernels by module of the network.

`training.profile=START:STEPS` writes RUN/profiles/step_START. TensorBoard's profile plugin opens that directory, and
ui.perfetto.dev the file perfetto_trace.json.gz in it. kernels.txt is the table.
"""

import collections
import contextlib
import gzip
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.runtime import processes

# Scopes in the names of operations -> module. The innermost scope counts.
MODULES = {
    "noise": "noise",
    "embedding": "embedding",
    "sigma_embedding": "noise level",
    "modulation": "modulation",
    "final_modulation": "modulation",
    "norm": "norm",
    "qkv": "projections of attention",
    "attention": "attention",
    "attention_out": "projections of attention",
    "mlp_in": "mlp",
    "mlp_out": "mlp",
    "dropout": "dropout",
    "blocks": "rest of the blocks",
    "ScoreNetwork": "rest of the network",
    "head": "head and loss",
    "optimizer": "optimizer",
}
OTHER = "other"
# Their events span those of what they run.
_CONTROL_FLOW = re.compile(r" (?:while|conditional|call)\(")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = ")
_DEAREST = 20


class Kernel(NamedTuple):
    """What calls of one operation take in a step of one device."""

    name: str
    module: str
    milliseconds: float
    calls: float


def is_due(training: configs.TrainingConfig, step: int) -> bool:
    """Whether a run that goes on from a step will reach steps to trace."""
    return bool(training.profile) and step <= _window(training)[0]


class Profile:
    """Traces the steps that `training.profile` names, in the first process. Where it fails, it warns and gives up.

    Args:
        run: the run.
        step_fn: the compiled training step, if `is_due`.
        say: what shows a message to the user.
    """

    def __init__(self, run: runs.Run, step_fn: Any, say: Callable[[str], None]) -> None:
        self._start, self._num_steps = _window(run.config.training)
        self._directory = run.local / "profiles" / f"step_{self._start}"
        self._step_fn, self._say = step_fn, say
        self._began: float | None = None  # Seconds on a clock; None unless steps are being traced.

    def begin(self, step: int, state: Any) -> None:
        """Starts the trace if the steps after this one, which gave `state`, are to be traced."""
        if self._num_steps == 0 or step != self._start or not processes.is_first():
            return
        jax.block_until_ready(state)
        with self._warns():
            shutil.rmtree(self._directory, ignore_errors=True)  # Of a life of the run that was killed.
            self._directory.mkdir(parents=True)
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._began = time.perf_counter()

    def end(self, step: int, result: Any, *, is_last: bool) -> None:
        """Ends the trace after its last step, or after the last step of the run. Writes and shows the table."""
        if self._began is None or (step < self._start + self._num_steps and not is_last):
            return
        jax.block_until_ready(result)
        seconds, self._began = time.perf_counter() - self._began, None
        with self._warns():
            jax.profiler.stop_trace()
            (trace,) = self._directory.glob("plugins/profile/*/perfetto_trace.json.gz")
            with gzip.open(trace, "rt") as file:
                events = json.load(file)["traceEvents"]
            num_steps = step - self._start
            found = kernels(events, self._step_fn.as_text(), num_steps)
            title = f"{num_steps} steps after step {self._start}, {jax.devices()[0].device_kind}: "
            title += f"{1e3 * seconds / num_steps:.4g} ms a step while traced"
            (self._directory / "kernels.txt").write_text(f"{title}\n\n{by_module(found)}\n\n{dearest(found)}\n")
            self._say(f"{title}\n{by_module(found)}\nthe trace is in {self._directory}")

    def close(self) -> None:
        """Ends a trace that an error left open."""
        if self._began is not None:
            self._began = None
            with self._warns():
                jax.profiler.stop_trace()

    @contextlib.contextmanager
    def _warns(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Whatever the profiler does on a platform, training is worth more.
            shutil.rmtree(self._directory, ignore_errors=True)  # A full disk is left to checkpoints.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"WARNING: no profile of the steps after {self._start}: {reason}")


def kernels(events: list[dict[str, Any]], program: str, num_steps: int) -> list[Kernel]:
    """The kernels of a compiled program, mean over devices and steps, the dearest first.

    Args:
        events: events of a trace in Chrome's format.
        program: text of the compiled program; its names of operations hold the scopes.
        num_steps: number of steps in the trace.
    """
    name_of_program = program.split(maxsplit=2)[1].rstrip(",")
    lines = {found[1]: line for line in program.splitlines() if (found := _INSTRUCTION.match(line))}
    # A GPU's kernels have the names of operations, with other characters for dots.
    lines |= {re.sub(r"\W", "_", name): line for name, line in lines.items()}
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event.get("name") == "thread_name"
    }
    times: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    devices = set()
    for event in events:
        arguments = event.get("args", {})
        if event.get("ph") != "X" or arguments.get("hlo_module", name_of_program) != name_of_program:
            continue
        name = event["name"]
        # TPUs name a thread for their operations, CPUs and GPUs the operation of each kernel.
        if "hlo_op" not in arguments and threads.get((event["pid"], event["tid"])) != "XLA Ops":
            continue
        line = lines.get(arguments.get("hlo_op", name)) or lines.get(re.sub(r"\W", "_", name), "")
        if not (name in lines and _CONTROL_FLOW.search(line)):
            times[name, _module(line)].append(event["dur"])
            devices.add((event["pid"], arguments.get("device_ordinal")))
    each = 1 / max(1, num_steps * len(devices))
    found = [Kernel(*key, 1e-3 * sum(durations) * each, len(durations) * each) for key, durations in times.items()]
    return sorted(found, key=lambda kernel: -kernel.milliseconds)


def by_module(found: list[Kernel]) -> str:
    """A table of milliseconds, share and calls of each module in a step."""
    sums: dict[str, list[Kernel]] = collections.defaultdict(list)
    for kernel in found:
        sums[kernel.module].append(kernel)
    rows = [
        Kernel("", module, sum(one.milliseconds for one in of), sum(one.calls for one in of))
        for module, of in sums.items()
    ]
    return _table(sorted(rows, key=lambda row: -row.milliseconds), found)


def dearest(found: list[Kernel]) -> str:
    """The table of the dearest kernels."""
    return _table(found[:_DEAREST], found)


def _table(rows: list[Kernel], of: list[Kernel]) -> str:
    total = sum(kernel.milliseconds for kernel in of)
    lines = [f"{'module':<26}{'ms a step':>10}{'share':>7}{'calls':>8}"]
    for name, module, milliseconds, calls in (*rows, Kernel("", "all kernels", total, sum(one.calls for one in of))):
        share = milliseconds / total if total else 0.0
        lines.append(f"{module:<26}{milliseconds:>10.3f}{share:>7.1%}{calls:>8.0f}  {name[:60]}".rstrip())
    return "\n".join(lines)


def _module(line: str) -> str:
    """The module of an instruction in a program's text."""
    scopes = re.findall(r"\w+", line.partition('op_name="')[2].partition('"')[0])
    return next((MODULES[scope] for scope in reversed(scopes) if scope in MODULES), OTHER)


def _window(training: configs.TrainingConfig) -> tuple[int, int]:
    """The step before the first one to trace, and the number of steps; no steps if none are asked for."""
    start, _, num_steps = training.profile.partition(":")
    return int(start or 0), int(num_steps or 0)
