"""`sedd bench`: our own steps are timed for real, the published program's by a stand-in with the same protocol."""

import json
import math
import os
import pathlib
import re
import sys

import pytest

from sedd_jax import config as configs
from sedd_jax.cli import main as cli
from sedd_jax.performance import benchmark
from sedd_jax.reverse import samplers
from sedd_jax.runtime import errors
from tests.support import compiling

TINY = configs.parse(
    configs.merge(
        {
            "data": {"length": 16},
            "network": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "dtype": "float32"},
            "training": {"batch_size": 2},
            "sampling": {"num_samples": 3},
        }
    )
)
# Reports half a second per step, and records its jobs.
STAND_IN = """
import json, sys
job = json.loads(sys.stdin.readline())
open(sys.argv[1] + "/jobs", "a").write(json.dumps(job) + "\\n")
print(json.dumps({"compile_seconds": 2.0, "versions": "stand-in 1", "attention": "none"}), flush=True)
for line in sys.stdin:
    print(json.dumps({"seconds": 0.5 * int(line), "peak_bytes": 10**9}), flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """The processes that run steps have one device each, not the eight of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", compiling.flags(num_devices=1))
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A benchmark of `TINY` against the stand-in, and the jobs of the stand-in."""
    checkout = tmp_path_factory.mktemp("published")
    (checkout / "graph_lib.py").touch()
    (checkout / "stand_in.py").write_text(STAND_IN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "PUBLISHED", checkout / "stand_in.py")
        patch.setattr(benchmark, "SECONDS_PER_TURN", 0.1)
        patch.setattr(benchmark, "SECONDS_OF_QUIET", 0.01)
        result = benchmark.benchmark(TINY, vocab_size=27, repeats=3, reference=checkout)
    return result, [json.loads(line) for line in (checkout / "jobs").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "batch_size"), [("train", 2), ("sample", 3)])
def test_figures_fit_together(compared, kind, batch_size):
    measured = compared[0][kind]
    ours, published = measured["programs"]["ours"], measured["programs"]["published"]
    assert measured["batch_size"] == batch_size
    assert sorted(ours["all_seconds"])[1] == ours["seconds"] > 0
    assert ours["tokens_per_second"] == pytest.approx(16 * batch_size / ours["seconds"])
    # 12 D^2 weights, 28 columns of the head at half of the positions, attention 12 D L; a third without gradients.
    per_token = (6 * (12 * 32**2 + 32 * 28 / 2) + 12 * 32 * 16) / (1 if kind == "train" else 3)
    assert ours["flops_per_second"] == pytest.approx(per_token * ours["tokens_per_second"], rel=1e-5)
    assert ours["utilization"] is ours["hardware_utilization"] is None  # No peak is known of a CPU.
    assert ours["compile_seconds"] > 0
    assert ours["peak_bytes"] > 50e6
    assert published["seconds"] == 0.5
    assert measured["ratio"]["speed"] == pytest.approx(0.5 / ours["seconds"])
    low, high = measured["ratio"]["speed_range"]
    assert low <= measured["ratio"]["speed"] <= high
    assert measured["ratio"]["memory"] == ours["peak_bytes"] / 1e9


def test_both_programs_have_the_same_job(compared):
    train, sample = compared[1]
    assert (train["kind"], train["batch_size"], sample["kind"], sample["batch_size"]) == ("train", 2, "sample", 3)
    assert (train["vocab_size"], train["length"], train["hidden_size"], train["dtype"]) == (27, 16, 32, "float32")
    assert (train["graph"], train["noise"], sample["sampler"]) == ("absorb", "loglinear", "tweedie")


def test_table_says_what_was_measured(compared):
    text = benchmark.table(compared[0])
    assert "32 x 1, length 16, 27 tokens, float32, median of 3" in text
    assert text.count("x the tokens/s") == 2
    assert "published: stand-in 1; attention: none" in text
    assert "ours: jax" in text
    busy = compared[0] | {"train": compared[0]["train"] | {"busy_cores": 1.5}}
    assert "WARNING: other processes kept up to 1.5 cores busy before turns of train" in benchmark.table(busy)


def test_work_of_other_processes_is_noticed(monkeypatch):
    ticks = iter([1000.0, 1000.0 + os.sysconf("SC_CLK_TCK")])
    monkeypatch.setattr(benchmark, "SECONDS_OF_QUIET", 0.5)
    monkeypatch.setattr(benchmark, "_busy_ticks", lambda: next(ticks))
    assert benchmark._busy_cores() == pytest.approx(2)


def test_a_system_without_such_counts_says_nothing(monkeypatch):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: (_ for _ in ()).throw(OSError()))
    assert math.isnan(benchmark._busy_ticks())


@pytest.mark.slow
def test_a_published_program_that_fails_says_why_and_ours_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "graph_lib.py").touch()
    (tmp_path / "broken.py").write_text("import sys; sys.exit('No module named torch')")
    monkeypatch.setattr(benchmark, "PUBLISHED", tmp_path / "broken.py")
    monkeypatch.setattr(benchmark, "SECONDS_PER_TURN", 0.01)
    assert cli.main(["bench", *as_flags(), "--vocab_size=27", "--repeats=1", f"--reference={tmp_path}"]) == 0
    out = capsys.readouterr().out
    for kind in benchmark.KINDS:
        why = f"{kind} of the published program failed: {sys.executable}: No module named torch"
        assert f"WARNING: {why}" in out
        assert re.search(rf"^{kind} +ours ", out, re.MULTILINE)
    assert not re.search(r"^\w+ +ratio ", out, re.MULTILINE)


def test_a_bug_of_ours_in_a_process_keeps_its_traceback():
    bug = "raise ValueError('a bug')"
    command = [sys.executable, "-c", bug]
    with pytest.raises(RuntimeError, match=r"(?s)Traceback .*ValueError: a bug"), benchmark._start("ours", command, {}):
        pass
    with (
        pytest.raises(errors.UserError, match=r"^/.*: ValueError: a bug$"),
        benchmark._start("published", command, {}),
    ):
        pass


def as_flags():
    return [f"--config.{name}={value}" for name, value in configs.flatten(configs.to_dict(TINY)).items()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats=0"], "--repeats=0 must be at least 1"),
        (["--vocab_size=0"], "--vocab_size=0 must be at least 1"),
        (["--reference=/nowhere"], "--reference=/nowhere has no graph_lib.py"),
        (["--reference=/nowhere", "--reference_python=/no/python"], "--reference_python=/no/python is no program"),
        (
            ["--config.network.attention=splash"],
            f"{sys.executable}: config.network.attention=splash runs on a TPU, not on this machine's CPU",
        ),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert cli.main(["bench", *as_flags(), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sedd bench: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sampling.sampler", "tau_leaping", "is not in the published program: set tweedie or euler"),
        ("sampling.sampler", "first_hitting", "is not in the published program: set tweedie or euler"),
        ("training.num_micro_batches", 2, "cannot be compared: set it to 1"),
    ],
)
def test_what_the_published_program_lacks_is_refused(name, value, message, tmp_path, capsys):
    (tmp_path / "graph_lib.py").touch()
    assert cli.main(["bench", *as_flags(), f"--reference={tmp_path}", f"--config.{name}={value}"]) == 1
    assert capsys.readouterr().err == f"sedd bench: --config.{name}={value} {message}\n"


def test_the_table_of_samplers_has_the_names_of_the_published_program():
    text = benchmark.PUBLISHED.read_text(encoding="utf-8")
    published = {name: sampler.traits.published_name for name, sampler in samplers.SAMPLERS.items()}
    known = {name: theirs for name, theirs in published.items() if theirs}
    assert known == {"tweedie": "analytic", "euler": "euler"}
    assert f'{json.dumps(known)}[job["sampler"]]' in text


@pytest.mark.skipif(
    "SEDD_REFERENCE" not in os.environ, reason="SEDD_REFERENCE names no checkout of the published program"
)
@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_published_program_runs_beside_ours(graph):
    """SEDD_REFERENCE=CHECKOUT SEDD_REFERENCE_PYTHON=PYTHON_WITH_TORCH pytest tests/test_benchmark.py"""
    changed = {"graph.name": graph, "network.scale_by_sigma": graph == "absorb"}
    config = configs.parse(configs.merge(configs.flatten(configs.to_dict(TINY)) | changed))
    result = benchmark.benchmark(
        config,
        vocab_size=27,
        repeats=1,
        reference=pathlib.Path(os.environ["SEDD_REFERENCE"]),
        reference_python=os.environ.get("SEDD_REFERENCE_PYTHON", sys.executable),
    )
    assert result["train"]["ratio"]["speed"] > 0
    assert result["sample"]["programs"]["published"]["versions"].startswith("torch")
