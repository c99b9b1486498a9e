"""Profiles: what counts as a kernel on each platform, the table, and runs that are traced, stopped or unable to."""

import dataclasses
import gzip
import io
import json
import os
import signal

import jax
import numpy as np
import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.runtime import processes, sharding
from sedd_jax.training import profiles, train, train_steps
from tests.support import small_runs

# In XLA's notation: a step whose loop runs a product of the MLP, and the kernels of attention and the optimizer.
PROGRAM = """HloModule jit_train_step, is_scheduled=true

%body (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %dot.1 = f32[2]{0} dot(%p, %p), metadata={op_name="jit(train_step)/while/body/jvp(ScoreNetwork)/blocks/mlp_in"}
}

ENTRY %main (p.1: f32[2]) -> f32[2] {
  %p.1 = f32[2]{0} parameter(0)
  %sdpa.2 = f32[2]{0} custom-call(%p.1), metadata={op_name="jit(train_step)/transpose(jvp(attention))/call"}
  %while.3 = f32[2]{0} while(%sdpa.2), condition=%c, body=%body, metadata={op_name="jit(train_step)/while"}
  ROOT %loop_add.4 = f32[2]{0} fusion(%while.3), kind=kLoop, metadata={op_name="jit(train_step)/optimizer/add"}
}
"""
SETTINGS = {
    "data": {"length": 16},
    "network": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "cond_dim": 16, "dtype": "float32"},
    "training": {"num_steps": 4, "batch_size": 8, "log_every": 1, "eval_every": 0, "sample_every": 0},
    "mesh": {"data": 1},
}


def event(name, microseconds, thread=1, process=1, **arguments):
    return {"ph": "X", "pid": process, "tid": thread, "name": name, "dur": microseconds, "args": arguments}


def thread_name(name, thread):
    return {"ph": "M", "pid": 1, "tid": thread, "name": "thread_name", "args": {"name": name}}


def op(name, microseconds, ordinal="0", module="jit_train_step", thread=1):
    return event(name, microseconds, thread, hlo_op=name, hlo_module=module, device_ordinal=ordinal)


ON_TPU = [thread_name("XLA Ops", 1), thread_name("Steps", 2)]
TRACES = {
    # Two devices in one process; the loop's event spans those of its body.
    "cpu": [
        op(name, n, ordinal) for ordinal in "01" for name, n in (("sdpa.2", 4000), ("while.3", 3000), ("dot.1", 2000))
    ],
    "gpu": [
        event("cudnn_sdpa", 4000, hlo_op="sdpa.2", hlo_module="jit_train_step"),
        event("nvjet_128x128", 1500, hlo_op="dot.1", hlo_module="jit_train_step"),
        # In a CUDA graph only the kernel's own name says what it is of.
        event("dot_1", 500, hlo_op="command_buffer_1", hlo_module="jit_train_step"),
    ],
    "tpu": [*ON_TPU, event("sdpa.2", 4000), event("while.3", 3000), event("dot.1", 2000), event("1", 9000, thread=2)],
}


@pytest.mark.parametrize("platform", TRACES)
def test_kernels_are_attributed_to_modules_once(platform):
    others = [
        op("dot.1", 7000, module="jit_advance"),
        event("python", 9000, thread=3),
        {"ph": "M", "name": "x", "pid": 1},
    ]
    found = profiles.kernels([*TRACES[platform], *others], PROGRAM, 2)
    sums = {module: sum(one.milliseconds for one in found if one.module == module) for module in ("attention", "mlp")}
    assert sums == pytest.approx({"attention": 2.0, "mlp": 1.0})
    assert sum(one.milliseconds for one in found) == pytest.approx(3.0)


def test_the_table_has_share_and_calls_of_a_step():
    events = [op("loop_add.4", 1500), op("loop_add.4", 1500), op("sdpa.2", 1000), op("p.1", 0)]
    found = profiles.kernels(events, PROGRAM, 1)
    lines = [line.split() for line in profiles.by_module(found).splitlines()]
    assert lines[1:] == [
        ["optimizer", "3.000", "75.0%", "2"],
        ["attention", "1.000", "25.0%", "1"],
        ["other", "0.000", "0.0%", "1"],
        ["all", "kernels", "4.000", "100.0%", "4"],
    ]
    assert profiles.dearest(found).splitlines()[1].split() == ["optimizer", "3.000", "75.0%", "2", "loop_add.4"]
    assert "0.0%" in profiles.by_module([])


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: first)
        yield


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    source = small_runs.write_letters(tmp_path_factory.mktemp("text"), 3_000)

    def make(**training):
        fields = configs.flatten(SETTINGS) | {"data.source": source}
        return configs.parse(configs.merge(fields | {f"training.{name}": value for name, value in training.items()}))

    return make


@pytest.fixture(scope="module")
def plain(make_config, tmp_path_factory):
    """The directory of a run that was not traced."""
    workdir = tmp_path_factory.mktemp("plain")
    train.train(make_config(), workdir, stream=io.StringIO())
    return workdir


def assert_same(workdir, other):
    jax.tree.map(np.testing.assert_array_equal, *(runs.load(each).params("params")[1] for each in (workdir, other)))


def test_every_module_has_operations(make_config):
    run = runs.unsaved(make_config(), 10)
    program = train_steps.lower_step(run, sharding.make_mesh(run.config.mesh))[1].compile().as_text()
    found = {profiles._module(line) for line in program.splitlines()}
    assert found == {*profiles.MODULES.values(), profiles.OTHER}


@pytest.mark.slow
def test_a_traced_run_has_the_same_parameters_a_trace_and_a_table(make_config, plain, tmp_path):
    stream = io.StringIO()
    train.train(make_config(profile="1:2"), tmp_path, stream=stream)
    assert_same(tmp_path, plain)
    directory = tmp_path / "profiles" / "step_1"
    (trace,) = directory.glob("plugins/profile/*/perfetto_trace.json.gz")
    assert len(list(trace.parent.glob("*.xplane.pb"))) == 1
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {one["args"]["run_id"] for one in events if one.get("args", {}).get("hlo_module") == "jit_train_step"}
    assert len(steps) == 2
    table = (directory / "kernels.txt").read_text()
    assert table.startswith("2 steps after step 1, cpu: ")
    assert "mlp" in table
    assert table.partition("\n\n")[2].partition("\n\n")[0] in stream.getvalue()


@pytest.mark.slow
def test_a_trace_ends_where_the_run_is_stopped_and_is_not_taken_again(make_config, plain, tmp_path):
    class Terminates(io.StringIO):
        def write(self, text):
            if "step 1/4" in text:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().write(text)

    config, stream = make_config(profile="0:4"), Terminates()
    assert train.train(config, tmp_path, stream=stream)["step"] == 2
    assert (tmp_path / "profiles/step_0/kernels.txt").read_text().startswith("2 steps after step 0")
    assert stream.getvalue().endswith(f"which is saved in {tmp_path}: the same command goes on\n")
    (tmp_path / "profiles").rename(tmp_path / "kept")
    train.train(config, tmp_path, stream=io.StringIO())
    assert not (tmp_path / "profiles").exists()
    assert_same(tmp_path, plain)


@pytest.fixture
def profile(make_config, plain, tmp_path):
    """A profile of steps 2 and 3 of a run, and what it has said."""
    said = []
    run = runs.load(plain)
    run = dataclasses.replace(run, workdir=tmp_path, config=make_config(profile="1:2"))
    return profiles.Profile(run, None, said.append), said


@pytest.mark.slow
def test_a_trace_that_cannot_be_written_is_one_warning(profile, tmp_path):
    traced, said = profile
    (tmp_path / "profiles").write_text("in the way")
    for step in range(4):
        traced.begin(step, None)
        traced.end(step + 1, None, is_last=step == 3)
    (warning,) = said
    assert warning.startswith("WARNING: no profile of the steps after 1: ")
    assert "\n" not in warning


@pytest.mark.slow
def test_a_full_disk_is_left_to_checkpoints(profile, tmp_path, monkeypatch):
    def fail():
        stop()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: vm.xplane.pb; No space left on device")

    stop, (traced, said) = jax.profiler.stop_trace, profile
    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    traced.begin(1, None)
    assert (tmp_path / "profiles/step_1").exists()
    traced.end(3, None, is_last=False)
    assert "No space left on device" in said[0]
    assert not (tmp_path / "profiles/step_1").exists()


@pytest.mark.slow
def test_an_error_in_between_ends_the_trace(profile):
    traced, said = profile
    traced.begin(1, None)
    traced.close()
    with pytest.raises(RuntimeError, match="No profile started"):
        jax.profiler.stop_trace()
    assert not said


def test_only_the_first_process_traces(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    profile[0].begin(1, None)
    profile[0].end(2, None, is_last=True)
    assert not any(tmp_path.iterdir())
