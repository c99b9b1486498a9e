"""Times a training step and a sampling step of a config, alone or against the published PyTorch program.

Each program and each kind of step runs in its own process, so that peak memory is measured separately. Two programs are
timed in alternation, because a machine's speed drifts. The reported ratio compares timings next to each other.
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
from sedd_jax.model import work
from sedd_jax.reverse import samplers
from sedd_jax.runtime import errors, hosts

KINDS = ("train", "sample")
PUBLISHED = pathlib.Path(__file__).with_name("benchmark_published.py")
# A timing takes enough steps to last this long, so that the overhead of the clock is negligible.
SECONDS_PER_TURN = 1.0
SECONDS_OF_QUIET = 0.3


class Worker:
    """A process that runs steps of one program on request.

    Attributes:
        ready: its first answer: seconds to compile, versions, attention.
        peak_bytes: peak memory of its steps.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], log: IO[str], job: dict[str, Any]):
        self._name, self._process, self._log = name, process, log
        self.ready = self._ask(job)
        self.peak_bytes = 0
        self._steps = 1
        self._steps = max(1, round(SECONDS_PER_TURN / self.turn()))

    def turn(self) -> float:
        """Seconds per step, over as many steps as `SECONDS_PER_TURN` needs.

        One step before them is not timed: while a process waits, it loses its memory and caches to others.
        """
        self._ask(1)
        answer = self._ask(self._steps)
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"] / self._steps

    def _ask(self, question: dict[str, Any] | int) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # The process has ended; its log says why.
            print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if answer:
            return json.loads(answer)
        status = self._process.wait()
        self._log.seek(0)
        log = self._log.read().strip()
        if self._name == "ours" and "Traceback" in log:
            raise RuntimeError(f"a process of the benchmark failed:\n{log}")
        why = log.splitlines()[-1] if log else f"ended with status {status}"
        raise errors.UserError(why, place=self._process.args[0])  # pyrefly: ignore[bad-index]


@contextlib.contextmanager
def _start(name: str, command: list[str], job: dict[str, Any]) -> Iterator[Worker]:
    # Without preallocation, peak memory is what the steps need.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment) as process,
    ):
        try:
            yield Worker(name, process, log, job)
        finally:
            process.kill()


def benchmark(
    config: configs.Config,
    *,
    vocab_size: int | None = None,
    repeats: int = 5,
    reference: pathlib.Path | None = None,
    reference_python: str = sys.executable,
    reference_compile: bool = False,
) -> dict[str, Any]:
    """Times a training step (training.batch_size) and a sampling step (sampling.num_samples) of a config.

    The sampling step is the one at t = 1/2 with half of the tokens masked, the average over a trajectory. Tokens are
    random and parameters untrained: neither changes the cost of a step.

    Args:
        config: a validated config.
        vocab_size: tokens without the mask; the tokenizer's if None.
        repeats: timings of each program; medians are reported.
        reference: a checkout of the published PyTorch program, timed in alternation with ours.
        reference_python: the Python with torch that runs the published program.
        reference_compile: whether the published program runs under torch.compile.

    Returns:
        For each kind of step and program: seconds, tokens per second, FLOP per second that the model needs
        (`model.work`), model and hardware FLOP utilisation if the device's peak is known, seconds to compile, peak
        bytes. With a reference also the ratio of tokens per second, its range over timings, and the ratio
        of peak bytes; or `failed`, why the published program cannot run.

    Raises:
        errors.UserError: if our program cannot run; the message ends with the last line of its output.
    """
    vocab_size = tokenizers.vocab_size_of(config.data.tokenizer) if vocab_size is None else vocab_size
    for name, value in (("repeats", repeats), ("vocab_size", vocab_size)):
        if value < 1:
            raise errors.UserError("must be at least 1", field=name, value=value)
    commands = {"ours": [sys.executable, "-m", "sedd_jax.performance.benchmark_ours"]}
    if reference is not None:
        _check_reference(config, reference, reference_python)
        commands["published"] = [reference_python, str(PUBLISHED), str(reference), *["--compile"][:reference_compile]]
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
    """The result as text: what was measured, a line per kind of step and program, ratios, and warnings."""
    network, data = result["config"]["network"], result["config"]["data"]
    lines = [
        f"{result['machine']}, {result['date']}",
        f"{network['hidden_size']} x {network['num_layers']}, length {data['length']}, {result['vocab_size']} tokens, "
        f"{network['dtype']}, median of {result['repeats']}",
        "",
        f"{'step':<8}{'program':<11}{'batch':>6}{'tokens/s':>11}{'s/step':>10}{'GFLOP/s':>10}{'MFU':>7}{'HFU':>7}"
        f"{'compile s':>11}{'peak GB':>9}",
    ]
    notes = []
    for kind in KINDS:
        for name, of in result[kind]["programs"].items():
            mfu, hfu = (
                "" if of[share] is None else f"{of[share]:.1%}" for share in ("utilization", "hardware_utilization")
            )
            lines.append(
                f"{kind:<8}{name:<11}{result[kind]['batch_size']:>6}{of['tokens_per_second']:>11,.0f}"
                f"{of['seconds']:>10.4f}{of['flops_per_second'] / 1e9:>10,.0f}{mfu:>7}{hfu:>7}"
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
        if "failed" in result[kind]:
            notes.append(f"WARNING: {kind} of the published program failed: {result[kind]['failed']}")
        busy = result[kind]["busy_cores"]
        if busy > 0.2:
            notes.append(f"WARNING: other processes kept up to {busy:.1f} cores busy before turns of {kind}")
    return "\n".join([*lines, "", *dict.fromkeys(notes), work.RULE])


def _measure(
    kind: str, config: configs.Config, vocab_size: int, repeats: int, commands: dict[str, list[str]]
) -> dict[str, Any]:
    batch_size = config.training.batch_size if kind == "train" else config.sampling.num_samples
    tokens = batch_size * config.data.length
    job = {"kind": kind, "vocab_size": vocab_size}
    jobs = {"ours": job | {"config": configs.to_dict(config)}, "published": job | _flat(config, batch_size)}
    failed = ""
    with contextlib.ExitStack() as stack:
        workers = {"ours": stack.enter_context(_start("ours", commands["ours"], jobs["ours"]))}
        if "published" in commands:
            try:
                workers["published"] = stack.enter_context(
                    _start("published", commands["published"], jobs["published"])
                )
            except errors.UserError as error:
                failed = str(error)
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        busy: list[float] = []
        for _ in range(repeats):
            busy.append(_busy_cores())
            for name, worker in workers.items():
                seconds[name].append(worker.turn())
        about = workers["ours"].ready
        programs: dict[str, dict[str, Any]] = {}
        for name, worker in workers.items():
            median = statistics.median(seconds[name])
            # The published program has the same model, and runs its head at every position.
            needed, repeated = (about["work"][part] * tokens / median for part in ("needed", "repeated"))
            programs[name] = {
                "seconds": median,
                "all_seconds": seconds[name],
                "tokens_per_second": tokens / median,
                "flops_per_second": needed,
                "utilization": None if about["peak_flops"] is None else needed / about["peak_flops"],
                "hardware_utilization": None
                if about["peak_flops"] is None or name != "ours"
                else (needed + repeated) / about["peak_flops"],
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
    if failed:
        measured["failed"] = failed
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
        raise errors.UserError(
            "is no program", field="reference_python", value=python, remedy="give a Python that has torch"
        )
    if not (reference / "graph_lib.py").is_file():
        raise errors.UserError(
            "has no graph_lib.py",
            field="reference",
            value=reference,
            remedy="give a checkout of github.com/louaaron/Score-Entropy-Discrete-Diffusion",
        )
    published = [name for name, sampler in samplers.SAMPLERS.items() if sampler.traits.published_name]
    if config.sampling.sampler not in published:
        raise errors.UserError(
            "is not in the published program",
            field="config.sampling.sampler",
            value=config.sampling.sampler,
            remedy=f"set {' or '.join(published)}",
        )
    if config.training.num_micro_batches != 1:
        raise errors.UserError(
            "cannot be compared",
            field="config.training.num_micro_batches",
            value=config.training.num_micro_batches,
            remedy="set it to 1",
        )


def _flat(config: configs.Config, batch_size: int) -> dict[str, Any]:
    """The settings that the published program needs, by our names."""
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
    """Cores that other processes keep busy while the workers wait; NaN if the system does not report it."""
    before = _busy_ticks()
    time.sleep(SECONDS_OF_QUIET)
    return (_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / SECONDS_OF_QUIET


def _busy_ticks() -> float:
    """Clock ticks of work of all cores, without idle time and waits for disks; NaN if the system has no such count."""
    try:
        first = pathlib.Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return math.nan
    ticks = [int(field) for field in first.split()[1:9]]
    return float(sum(ticks) - ticks[3] - ticks[4])
