"""What a training step and a sampling step of a config cost here, alone or beside the published PyTorch program.

Each program and each kind of step has a process of its own, so that memory is its own too. Two programs take their
steps by turns in one run, since a machine's speed drifts; the ratio is that of neighbours in time.
"""

import contextlib
import datetime
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

from sedd_jax import config as configs
from sedd_jax.data import tokenizers
from sedd_jax.runtime import hosts

KINDS = ("train", "sample")
PUBLISHED = pathlib.Path(__file__).with_name("benchmark_published.py")
# Steps are taken until a turn is this long, so that starting and stopping the clock costs nothing beside it.
SECONDS_PER_TURN = 1.0
SECONDS_OF_QUIET = 0.3


class Worker:
    """A process that takes steps of one program when asked.

    Attributes:
        ready: what it said when it was ready: seconds to compile, versions, attention.
        peak_bytes: most memory that its steps have used.
    """

    def __init__(self, process: subprocess.Popen[str], log: IO[str], job: dict[str, Any]):
        self._process, self._log = process, log
        self.ready = self._ask(job)
        self.peak_bytes = 0
        self._steps = 1
        self._steps = max(1, round(SECONDS_PER_TURN / self.turn()))

    def turn(self) -> float:
        """Takes as many steps as make a turn; seconds of one.

        A step before them is not timed: while a process waits, a machine takes its memory and caches away.
        """
        self._ask(1)
        answer = self._ask(self._steps)
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"] / self._steps

    def _ask(self, question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended, and its log says why.
            print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if answer:
            return json.loads(answer)
        status = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        why = lines[-1] if lines else f"ended with status {status}"
        raise ValueError(f"{self._process.args[0]}: {why}")  # pyrefly: ignore[bad-index]


@contextlib.contextmanager
def _start(command: list[str], job: dict[str, Any]) -> Iterator[Worker]:
    # Memory shall be what steps need, not what JAX takes beforehand.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment) as process,
    ):
        try:
            yield Worker(process, log, job)
        finally:
            process.kill()


def benchmark(
    config: configs.Config,
    *,
    vocab_size: int | None = None,
    repeats: int = 5,
    reference: pathlib.Path | None = None,
    reference_python: str = sys.executable,
) -> dict[str, Any]:
    """Times a training step (training.batch_size) and a sampling step (sampling.num_samples) of a config.

    A sampling step is the one at t = 1/2, half of the tokens masked, as they are on average over a trajectory. Tokens
    are random and parameters fresh: neither changes what a step costs.

    Args:
        config: a validated config.
        vocab_size: tokens, the mask left out; the tokenizer's if None.
        repeats: turns of each program; medians are reported.
        reference: a checkout of the published PyTorch program, to be timed by turns with ours.
        reference_python: the interpreter that runs it, with torch.

    Returns:
        For each kind of step and program: seconds, tokens per second, model FLOP per second (a sampling step is a third
        of a training step), their share of the device's peak if that is known, seconds to compile, peak bytes. With a
        reference also the ratio of tokens per second and its range over turns, and the ratio of peak bytes.

    Raises:
        ValueError: where a program cannot run, with its last line.
    """
    vocab_size = tokenizers.vocab_size_of(config.data.tokenizer) if vocab_size is None else vocab_size
    for name, value in (("repeats", repeats), ("vocab_size", vocab_size)):
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    commands = {"ours": [sys.executable, "-m", "sedd_jax.performance.benchmark_ours"]}
    if reference is not None:
        _check_reference(config, reference, reference_python)
        commands["published"] = [reference_python, str(PUBLISHED), str(reference)]
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores of {hosts.processor()}, {platform.system()}",
        "config": configs.to_dict(config),
        "vocab_size": vocab_size,
        "repeats": repeats,
    }
    for kind in KINDS:
        result[kind] = _measure(kind, config, vocab_size, repeats, commands)
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text: what was measured, a line for each kind of step and program, ratios, warnings."""
    network, data = result["config"]["network"], result["config"]["data"]
    lines = [
        f"{result['machine']}, {result['date']}",
        f"{network['hidden_size']} x {network['num_layers']}, length {data['length']}, {result['vocab_size']} tokens, "
        f"{network['dtype']}, median of {result['repeats']}",
        "",
        f"{'step':<8}{'program':<11}{'batch':>6}{'s/step':>10}{'tokens/s':>11}{'GFLOP/s':>10}{'of peak':>9}"
        f"{'compile s':>11}{'peak GB':>9}",
    ]
    notes = []
    for kind in KINDS:
        for name, of in result[kind]["programs"].items():
            share = "" if of["utilization"] is None else f"{of['utilization']:.1%}"
            lines.append(
                f"{kind:<8}{name:<11}{result[kind]['batch_size']:>6}{of['seconds']:>10.4f}"
                f"{of['tokens_per_second']:>11,.0f}{of['flops_per_second'] / 1e9:>10,.0f}{share:>9}"
                f"{of['compile_seconds']:>11.1f}{of['peak_bytes'] / 1e9:>9.2f}"
            )
            notes.append(f"{name}: {of['versions']}; attention: {of['attention']}")
        if "ratio" in result[kind]:
            ratio = result[kind]["ratio"]
            low, high = ratio["speed_range"]
            lines.append(
                f"{kind:<8}{'ratio':<11}{ratio['speed']:.2f}x the tokens/s ({low:.2f} to {high:.2f}), "
                f"{ratio['memory']:.2f}x the memory"
            )
        busy = result[kind]["busy_cores"]
        if busy > 0.2:
            notes.append(f"WARNING: other processes kept up to {busy:.1f} cores busy before turns of {kind}")
    return "\n".join([*lines, "", *dict.fromkeys(notes)])


def _measure(
    kind: str, config: configs.Config, vocab_size: int, repeats: int, commands: dict[str, list[str]]
) -> dict[str, Any]:
    batch_size = config.training.batch_size if kind == "train" else config.sampling.num_samples
    tokens = batch_size * config.data.length
    job = {"kind": kind, "vocab_size": vocab_size}
    jobs = {"ours": job | {"config": configs.to_dict(config)}, "published": job | _flat(config, batch_size)}
    with contextlib.ExitStack() as stack:
        # The one that may lack something starts first.
        started = {name: stack.enter_context(_start(commands[name], jobs[name])) for name in reversed(commands)}
        workers = {name: started[name] for name in commands}
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        busy: list[float] = []
        for _ in range(repeats):
            busy.append(_busy_cores())
            for name, worker in workers.items():
                seconds[name].append(worker.turn())
        about = workers["ours"].ready
        flops_per_token = about["flops_per_token"] / (1 if kind == "train" else 3)
        programs: dict[str, dict[str, Any]] = {}
        for name, worker in workers.items():
            median = statistics.median(seconds[name])
            flops = flops_per_token * tokens / median
            programs[name] = {
                "seconds": median,
                "all_seconds": seconds[name],
                "tokens_per_second": tokens / median,
                "flops_per_second": flops,
                "utilization": None if about["peak_flops"] is None else flops / about["peak_flops"],
                "compile_seconds": worker.ready["compile_seconds"],
                "peak_bytes": worker.peak_bytes,
                "versions": worker.ready["versions"],
                "attention": worker.ready["attention"],
            }
    measured: dict[str, Any] = {
        "batch_size": batch_size,
        "device": about["device"],
        "num_devices": about["num_devices"],
        "busy_cores": max(busy),
        "programs": programs,
    }
    if len(programs) == 2:
        ours, theirs = programs["ours"], programs["published"]
        pairs = [b / a for a, b in zip(ours["all_seconds"], theirs["all_seconds"], strict=True)]
        measured["ratio"] = {
            "speed": statistics.median(pairs),
            "speed_range": [min(pairs), max(pairs)],
            "memory": ours["peak_bytes"] / theirs["peak_bytes"],
        }
    return measured


def _check_reference(config: configs.Config, reference: pathlib.Path, python: str) -> None:
    if shutil.which(python) is None:
        raise ValueError(f"--reference_python={python} is no program: give a Python that has torch")
    if not (reference / "graph_lib.py").is_file():
        raise ValueError(
            f"--reference={reference} has no graph_lib.py: give a checkout of "
            "github.com/louaaron/Score-Entropy-Discrete-Diffusion"
        )
    if config.sampling.sampler not in ("tweedie", "euler"):
        raise ValueError(
            f"--config.sampling.sampler={config.sampling.sampler} is not in the published program: set tweedie or euler"
        )
    if config.training.num_micro_batches != 1:
        raise ValueError(
            f"--config.training.num_micro_batches={config.training.num_micro_batches} cannot be compared: set it to 1"
        )


def _flat(config: configs.Config, batch_size: int) -> dict[str, Any]:
    """What the published program needs to know, by our names."""
    values = configs.to_dict(config)
    return {
        **values["network"],
        **values["noise"],
        **values["optimizer"],
        **values["sampling"],
        "graph": config.graph.name,
        "noise": config.noise.name,
        "length": config.data.length,
        "batch_size": batch_size,
    }


def _busy_cores() -> float:
    """Cores that other processes keep busy while the workers wait; not a number where the system does not tell."""
    before = _busy_ticks()
    time.sleep(SECONDS_OF_QUIET)
    return (_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / SECONDS_OF_QUIET


def _busy_ticks() -> float:
    """Clock ticks that all cores have worked, idling and waiting for disks left out."""
    try:
        first = pathlib.Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return math.nan
    ticks = [int(field) for field in first.split()[1:9]]
    return float(sum(ticks) - ticks[3] - ticks[4])
