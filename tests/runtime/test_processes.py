"""Real processes with devices of their own: they train one run together, stop, and resume on other meshes."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.runtime import processes, sharding
from tests.support import small_runs

SETTINGS = {
    "data.length": 16,
    "network.hidden_size": 32,
    "network.num_layers": 2,
    "network.num_heads": 4,
    "network.cond_dim": 16,
    "network.dtype": "float32",
    "optimizer.warmup_steps": 5,
    "training.num_steps": 16,
    "training.batch_size": 16,
    "training.num_micro_batches": 2,
    "training.log_every": 1,
    "training.eval_every": 8,
    "training.eval_sequences": 24,
    "training.sample_every": 16,
    "training.checkpoint_every": 8,
    "sampling.num_steps": 2,
    "sampling.num_samples": 3,
}

NO_SAMPLES = {"training.sample_every": 0}  # Saves the compilation of the sampling programs.


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with text."""
    directory = tmp_path_factory.mktemp("processes")
    small_runs.write_letters(directory, 5_000)
    return directory


@contextlib.contextmanager
def started(place, num_processes, *arguments):
    """Runs `sedd` in several processes with 8 devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sedd_jax", *arguments]
    command += [f"--num_processes={num_processes}", f"--coordinator_address=localhost:{port}"]
    environment = small_runs.environment(8 // num_processes)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [
        subprocess.Popen([*command, f"--process_id={number}"], env=environment, **pipes)
        for number in range(num_processes)
    ]
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def train(place, workdir, num_processes, mesh, *arguments, stop_at=None, **settings):
    """Exit statuses, stderr of the first process, and stderr of the others.

    The last process gets SIGTERM once the first has written `stop_at`.
    """
    values = SETTINGS | settings | {"data.source": f"text:{place}/{{split}}.txt"}
    values |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    with started(place, num_processes, "train", f"--workdir={workdir}", *arguments, *flags) as children:
        said = ""
        while stop_at is not None and stop_at not in said:
            line = children[0].stderr.readline()
            assert line, said
            said += line
        if stop_at is not None:
            children[-1].send_signal(signal.SIGTERM)
        outputs = [child.communicate(timeout=300) for child in children]
        return [child.returncode for child in children], said + outputs[0][1], [err for _, err in outputs[1:]]


def parameters(workdir):
    return runs.load(workdir).params("ema_params")


@pytest.fixture(scope="module")
def alone(place):
    """The run in one process, with a whole copy of the model on each device."""
    statuses, err, _ = train(place, place / "alone", 1, (8, 1, 1))
    assert statuses == [0], err
    return place / "alone"


@pytest.fixture(scope="module")
def together(place):
    statuses, err, others = train(place, place / "together", 2, (2, 2, 2))
    assert statuses == [0, 0], err
    assert others == [""]
    return place / "together"


def assert_close(workdir, other):
    ours, theirs = small_runs.logged(workdir), small_runs.logged(other)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for record, expected in zip(ours, theirs, strict=True):
        assert record == pytest.approx(expected, rel=2e-4)
    (step, params), (other_step, expected) = parameters(workdir), parameters(other)
    assert step == other_step
    np.testing.assert_allclose(params["embedding"], expected["embedding"], atol=2e-5)


@pytest.mark.slow
def test_two_processes_train_like_one(alone, together):
    assert_close(together, alone)
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert (together / "samples" / "00000016.txt").exists()


@pytest.mark.slow
def test_a_tensor_axis_that_crosses_processes_and_sigterm_to_one_of_four(place, alone):
    """Four processes start a run and stop when one gets SIGTERM. One process on another mesh finishes the run."""
    workdir = place / "four"
    statuses, err, _ = train(place, workdir, 4, (1, 2, 4), stop_at="step 2/", **NO_SAMPLES)
    assert statuses == [75] * 4, err
    stopped = int(re.search(r"stopped by SIGTERM at step (\d+), which is saved", err).group(1))
    assert 2 <= stopped < 16
    assert parameters(workdir)[0] == stopped
    statuses, err, _ = train(place, workdir, 1, (4, 2, 1), **NO_SAMPLES)
    assert statuses == [0], err
    assert f"resumed {workdir} at step {stopped}" in err
    assert_close(workdir, alone)


@pytest.mark.slow
def test_a_stopped_run_of_two_goes_on_bit_for_bit(place, together):
    workdir = place / "stopped"
    statuses, err, _ = train(place, workdir, 2, (2, 2, 2), stop_at="step 3/", **NO_SAMPLES)
    assert statuses == [75, 75], err
    statuses, err, _ = train(place, workdir, 2, (2, 2, 2), **NO_SAMPLES)
    assert statuses == [0, 0], err
    assert small_runs.logged(workdir) == small_runs.logged(together)
    (step, params), (other_step, expected) = parameters(workdir), parameters(together)
    assert step == other_step
    np.testing.assert_array_equal(params["head_kernel"], expected["head_kernel"])


@pytest.mark.slow
def test_prompts_of_two_processes_are_those_of_one_and_go_on_after_a_stop(place, together):
    prompts = place / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"template": f"ab{{{n}}}ba"}) + "\n" for n in (8, 4, 12, 2, 6)))
    out = {number: place / f"texts_of_{number}.jsonl" for number in (1, 2)}

    def sample(number):
        flags = [f"--workdir={together}", f"--prompts={prompts}", "--num_samples=2", "--num_steps=4"]
        with started(place, number, "sample", *flags, "--fit", f"--out={out[number]}") as children:
            outputs = [child.communicate(timeout=300) for child in children]
        assert [child.returncode for child in children] == [0] * number, outputs
        assert not any("---" in printed for printed, _ in outputs[1:])
        return out[number].read_text().splitlines()

    lines = sample(1)
    assert sorted(json.loads(line)["index"] for line in lines) == list(range(5))
    assert sample(2) == lines
    out[2].write_text("\n".join(lines[:2]) + "\n" + lines[2][:9])
    again = sample(2)
    assert again[:2] == lines[:2]
    assert sorted(json.loads(line)["index"] for line in again) == list(range(5))


@pytest.mark.slow
def test_what_fails_in_the_first_process_ends_the_others(place):
    statuses, err, others = train(place, place / "none", 2, (8, 1, 1), **{"data.tokenizer": "gpt3"})
    assert statuses == [1, 1]
    assert "gpt3" in err
    assert all(f"process 0 says: {err.removeprefix('sedd train: ')}" in other for other in others)
    assert not (place / "none").exists()


def test_the_devices_of_a_mesh_are_those_of_all_processes():
    assert sharding.make_mesh(sharding.MeshConfig()).size == 8
    assert processes.is_first()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1234", 2, None), "process_id is missing: give all of coordinator_address, num_processes"),
        ((None, 2, 0), "coordinator_address is missing"),
        (("localhost", 2, 0), "coordinator_address=localhost has no port"),
        (("localhost:1234", 2, 2), "process_id=2 must be from 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*given)


def test_one_process_joins_nobody():
    processes.join(None, 1, None)
