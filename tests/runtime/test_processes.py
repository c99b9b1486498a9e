"""Real processes with devices of their own: they train one run together, stop, and resume on other meshes."""

import contextlib
import json
import re
import signal
import socket
import warnings

import jax
import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.runtime import errors, processes, sharding
from tests.support import forks, small_runs

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
# Several processes on CPUs keep no compiled programs. Here each keeps its own, which it finds in the runs that follow.
KEEPS_PROGRAMS = """
import types
import jax
from jax._src import compiler
from sedd_jax.runtime import processes

join = processes.join

def join_and_keep(*arguments):
    join(*arguments)
    jax.config.update("jax_enable_compilation_cache", True)
    compiler.distributed = types.SimpleNamespace(global_state=types.SimpleNamespace(process_id=0, client=None))

processes.join = join_and_keep
"""
# The survivors of a process that died wait so long for it, in place of a minute.
SHORT_WAIT = "\nprocesses._SHUTDOWN_SECONDS = 5\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with text."""
    directory = tmp_path_factory.mktemp("processes")
    small_runs.write_letters(directory, 5_000)
    return directory


@contextlib.contextmanager
def started(num_processes, *arguments, num_devices=8):
    """Runs `sedd` in several processes with so many devices in all."""
    command = [*arguments, f"--num_processes={num_processes}", f"--coordinator_address=localhost:{free_port()}"]
    surroundings = {"env": small_runs.environment(num_devices // num_processes)}
    surroundings["prelude"] = KEEPS_PROGRAMS + SHORT_WAIT if num_processes > 1 else ""
    children = [
        forks.server().start(*command, f"--process_id={number}", **surroundings) for number in range(num_processes)
    ]
    try:
        yield children
    finally:
        for child in children:
            child.end()


def train(place, workdir, num_processes, mesh, *, num_devices=8, stop_at=None, **settings):
    """Exit statuses, stderr of the first process, and stderr of the others.

    The last process gets SIGTERM once the first has written `stop_at`.
    """
    values = SETTINGS | settings | {"data.source": f"text:{place}/{{split}}.txt"}
    values |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    with started(num_processes, "train", f"--workdir={workdir}", *flags, num_devices=num_devices) as children:
        said = ""
        while stop_at is not None and stop_at not in said:
            line = children[0].stderr.readline()
            assert line, said
            said += line
        if stop_at is not None:
            children[-1].send_signal(signal.SIGTERM)
        outputs = [child.communicate(timeout=900) for child in children]
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
    # The other may speak up where the first one starts late.
    assert [line for line in others[0].splitlines() if not line.startswith("waiting ")] == []
    return place / "together"


def assert_close(workdir, other, *, is_evaluated=True):
    ours, theirs = small_runs.logged(workdir), small_runs.logged(other)
    if not is_evaluated:
        theirs = [record for record in theirs if "train/loss" in record]
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
    workdir, without = place / "four", NO_SAMPLES | {"training.eval_every": 0}
    statuses, err, _ = train(place, workdir, 4, (1, 2, 2), num_devices=4, stop_at="step 2/", **without)
    assert statuses == [75] * 4, err
    stopped = int(re.search(r"stopped by SIGTERM at step (\d+), which is saved", err).group(1))
    assert 2 <= stopped < 16
    assert parameters(workdir)[0] == stopped
    statuses, err, _ = train(place, workdir, 1, (8, 1, 1), **without)
    assert statuses == [0], err
    assert f"resumed {workdir} at step {stopped}" in err
    assert_close(workdir, alone, is_evaluated=False)


@pytest.mark.slow
def test_a_stopped_run_of_two_goes_on_bit_for_bit(place, together):
    workdir = place / "stopped"
    statuses, err, _ = train(place, workdir, 2, (2, 2, 2), stop_at="step 3/")
    assert statuses == [75, 75], err
    statuses, err, _ = train(place, workdir, 2, (2, 2, 2))
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
        with started(number, "sample", *flags, "--fit", f"--out={out[number]}") as children:
            outputs = [child.communicate(timeout=900) for child in children]
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
        (("localhost:99999", 2, 1), "coordinator_address=localhost:99999 has no port that exists"),
        (("localhost:0", 2, 1), "has no port that exists: give one from 1 to 65535"),
        (("localhost:http", 2, 1), "has no port that exists"),
        (("localhost:", 2, 1), "has no port that exists"),
        ((":1234", 2, 1), "has no port: give host:port"),
        (("no-such-host.invalid:1234", 2, 1), "has a host that is not known here"),
        (("a..b:1234", 2, 1), "has a host that is not known here"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        processes.join(*given)


def test_a_port_that_another_program_uses_is_named():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(errors.UserError, match=rf"localhost:{port} has a port that process 0 cannot listen at"):
            processes.join(f"localhost:{port}", 2, 0)


# Waits for two seconds at most and speaks up after one.
WAITING = """
from sedd_jax.runtime import processes

processes._SAID_AFTER_SECONDS, processes._MEETING_SECONDS = 1, {seconds}
"""
IN_SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@contextlib.contextmanager
def waiting(seconds, *flags, **variables):
    environment, prelude = small_runs.environment() | variables, WAITING.format(seconds=seconds)
    child = forks.server().start("sample", "--workdir=none", *flags, env=environment, prelude=prelude)
    try:
        yield child
    finally:
        child.end()


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_one_task_of_four_says_whom_it_waits_for_and_ends_by_itself():
    with waiting(2, **IN_SLURM, JAX_COORDINATOR_PORT=str(port := free_port())) as child:
        err = child.communicate(timeout=60)[1]
    for_three = f"at localhost:{port} for 3 of 4 processes (SLURM_NTASKS=4)"
    assert err.splitlines() == [
        f"waiting {for_three}; --num_processes=1 runs alone",
        f"sedd sample: waited 2 seconds {for_three}: start all of them within that time, or --num_processes=1 to run "
        "alone",
    ]
    assert child.returncode == 1


def test_a_coordinator_that_is_not_there_is_waited_for_with_a_word():
    flags = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=1"]
    with waiting(2, *flags) as child:
        first, last = child.communicate(timeout=60)[1].splitlines()
    assert re.match(r"waiting for process 0 of 2 at 127\.0\.0\.1:\d+ \(Connection refused\); --num_processes=1", first)
    assert last.startswith("sedd sample: waited 2 seconds for process 0 of 2")
    assert child.returncode == 1


def test_ctrl_c_ends_the_wait_for_other_processes():
    with waiting(60, **IN_SLURM, JAX_COORDINATOR_PORT=str(free_port())) as child:
        assert child.stderr.readline().startswith("waiting at")
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=60)[1] == "sedd sample: interrupted\n"
    assert child.returncode == 130


@pytest.fixture
def before_jax_starts(monkeypatch):
    monkeypatch.setattr(jax._src.distributed.xla_bridge, "backends_are_initialized", lambda: False)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (IN_SLURM | {"SLURM_NTASKS": "four"}, "cannot meet (invalid literal for int() with base 10: 'four')"),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, "cannot meet (Number of processes must be defined.)"),
    ],
)
def test_a_cluster_that_cannot_be_read_is_one_line(before_jax_starts, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.UserError, match=re.escape(message)) as found:
        processes._meet(dict.fromkeys(("coordinator_address", "num_processes", "process_id")))
    assert str(found.value).endswith("or num_processes=1 to run alone")


def test_a_pod_of_kubernetes_runs_alone_without_a_word(before_jax_starts, monkeypatch, capfd):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with warnings.catch_warnings(record=True) as said:
        assert not processes._meet(dict.fromkeys(("coordinator_address", "num_processes", "process_id")))
    assert not said
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_survivors_of_a_process_that_dies_name_the_newest_checkpoint(place, victim):
    workdir = place / f"without {victim}"
    values = SETTINGS | {"data.source": f"text:{place}/{{split}}.txt", "training.num_steps": 100_000}
    values |= {"training.eval_every": 0, "training.sample_every": 0, "training.checkpoint_every": 2}
    values |= {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}  # Its programs are compiled already.
    flags = [f"--config.{name}={value}" for name, value in values.items()]
    with started(2, "train", f"--workdir={workdir}", *flags) as children:
        while not (workdir / "checkpoints" / "4").exists():
            assert children[0].stderr.readline()
        children[victim].kill()
        err = [child.communicate(timeout=150)[1] for child in children][1 - victim]
    assert children[1 - victim].returncode == -signal.SIGABRT  # Launchers start the run again on it.
    step = r"the newest checkpoint is of step \d+; the same command goes on\n"
    assert re.search(rf"(another process died|ended because another one died): {step}", err), err
    assert "Traceback" not in err


def test_one_process_joins_nobody():
    processes.join(None, 1, None)


@pytest.fixture
def hangup_is_default():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_hangs_up_stops_a_run_as_sigterm_does(hangup_is_default, capfd):
    with processes.told_to_stop() as told:
        assert not told(1)
        signal.raise_signal(signal.SIGHUP)
        assert told(2)
    assert capfd.readouterr().err == "the terminal hung up (SIGHUP): the next step is saved, and the run ends\n"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_a_run_under_nohup_goes_on(hangup_is_default):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with processes.told_to_stop() as told:
        signal.raise_signal(signal.SIGHUP)
        assert not told(1)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_work_that_is_done_again_is_waited_for_again(monkeypatch):
    """A key of the processes' store is set only once."""
    store: dict[str, str] = {}

    class Client:
        def key_value_set(self, key, value):
            if key in store:
                raise RuntimeError(f"ALREADY_EXISTS: {key}")
            store[key] = value

    monkeypatch.setattr(processes.distributed.global_state, "client", Client())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    done = []
    for number in range(2):
        processes.first_then_all("test", lambda number=number: done.append(number))
    assert done == [0, 1]
    assert len(store) == 2
