"""A run that is killed many times, also during saves, ends with the weights of one that was never stopped.

Each life is a process of `sedd train`.
"""

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.evaluation import perplexity
from tests.support import forks, gcs_emulator, small_runs

FEW, MANY = 2, 14  # kills
SETTINGS = {
    "data.length": 16,
    "network.hidden_size": 32,
    "network.num_layers": 1,
    "network.num_heads": 2,
    "network.cond_dim": 16,
    "network.dtype": "float32",
    "training.num_steps": 18,
    "training.batch_size": 8,
    "training.log_every": 1,
    "training.eval_every": 0,
    "training.sample_every": 0,
    "training.checkpoint_every": 2,
    "training.keep_checkpoints": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kills")
    small_runs.write_letters(directory, 3_000)
    return directory


LONG = {"training.num_steps": 3 * MANY}


def start(place, workdir, *arguments, variables=None, **settings):
    values = SETTINGS | {"data.source": f"text:{place}/{{split}}.txt"} | settings
    fields = [f"--config.{name}={value}" for name, value in values.items()]
    environment = small_runs.environment() | (variables or {})
    return forks.server().start("train", f"--workdir={workdir}", *arguments, *fields, env=environment)


def train(*arguments, **settings):
    """Exit status and standard error."""
    child = start(*arguments, **settings)
    err = child.communicate()[1]
    return child.returncode, err


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The directory of a run of 18 steps."""
    status, err = train(place, place / "uninterrupted")
    assert status == 0, err
    return place / "uninterrupted"


@pytest.fixture(scope="module")
def long_uninterrupted(place):
    """The directory of a run of 42 steps."""
    status, err = train(place, place / "long_uninterrupted", **LONG)
    assert status == 0, err
    return place / "long_uninterrupted"


def assert_same_run(workdir, expected):
    assert small_runs.logged(workdir) == small_runs.logged(expected)
    (step, params), (other_step, other) = (runs.load(each).params("ema_params") for each in (workdir, expected))
    assert step == other_step
    jax.tree.map(np.testing.assert_array_equal, params, other)


def wait_for_steps(child, number):
    for _ in range(number):
        line = child.stderr.readline()
        while line and not line.startswith("step "):
            line = child.stderr.readline()


def live_and_die(child, generator, workdir, how):
    """Ends a run at a random time, after a few steps or none. Returns whether a save was in progress."""
    wait_for_steps(child, generator.randrange(0, 5))
    time.sleep(generator.uniform(0, 0.3))
    child.send_signal(how)
    saving = any("orbax-checkpoint-tmp" in path.name for path in (workdir / "checkpoints").glob("*"))
    child.communicate()
    return saving


def kill_often(place, workdir, num_kills, settings):
    """Kills a run, then lets it finish. Returns whether a save was in progress each time."""
    generator, endings, during_saves = random.Random(0), [], []
    for number in range(num_kills):
        child = start(place, workdir, **settings)
        during_saves.append(live_and_die(child, generator, workdir, (signal.SIGTERM, signal.SIGKILL)[number % 2]))
        endings.append(child.returncode)
    # A run that had finished early would have been killed fewer times.
    assert 0 not in endings
    assert endings.count(75) >= num_kills // 4
    assert endings.count(-signal.SIGKILL) == num_kills // 2
    status, err = train(place, workdir, **settings)
    assert status == 0, err
    assert f"resumed {workdir}" in err
    return during_saves


def assert_nothing_is_left(place, workdir, expected, checkpoints):
    """No partial files."""
    assert sorted(path.name for path in workdir.iterdir()) == sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == checkpoints
    assert not [path for path in place.iterdir() if "partial" in path.name]


def test_kills_change_nothing(place, uninterrupted):
    workdir = place / "killed"
    kill_often(place, workdir, FEW, {})
    assert_same_run(workdir, uninterrupted)
    assert_nothing_is_left(place, workdir, uninterrupted, ["16", "18"])


TAKES_TERMINAL = (
    "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_its_step(place):
    workdir = place / "hung up"
    ours, theirs = pty.openpty()

    values = SETTINGS | {"data.source": f"text:{place}/{{split}}.txt", "training.num_steps": 100_000}
    values["training.checkpoint_every"] = 50_000
    command = [sys.executable, "-c", TAKES_TERMINAL, "-m", "sedd_jax", "train", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in values.items()]
    surroundings = small_runs.environment() | {"TERM": "dumb"}
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    child = subprocess.Popen(command, env=surroundings, start_new_session=True, **streams)
    os.close(theirs)
    seen = b""
    while b"step 3/" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert child.wait(timeout=120) == 75
    (saved,) = (workdir / "checkpoints").iterdir()
    assert int(saved.name) >= 3


@pytest.mark.slow
def test_many_kills_change_nothing(place, long_uninterrupted):
    workdir = place / "killed often"
    assert any(kill_often(place, workdir, MANY, LONG))
    assert_same_run(workdir, long_uninterrupted)
    assert_nothing_is_left(place, workdir, long_uninterrupted, ["40", "42"])


def begin_two(place, workdir, **settings):
    """Two trainings of one run at once: one trains, the other says who that is."""
    children = [start(place, workdir, **settings) for _ in range(2)]
    said = [child.communicate()[1] for child in children]
    assert sorted(child.returncode for child in children) == [0, 1], said
    last = children[0].returncode
    owner, other = children[last], said[1 - last]
    assert other.startswith(f"sedd train: --workdir={workdir} is in use by process {owner.pid} on ")
    assert other.count("\n") == 1
    assert not [path for path in place.iterdir() if path.name.startswith(f".{workdir.name}")]


@pytest.mark.slow
def test_of_two_that_begin_one_run_one_says_who_the_other_is(place, uninterrupted):
    """A job that was submitted twice."""
    begin_two(place, place / "both")
    assert_same_run(place / "both", uninterrupted)


@pytest.mark.slow
def test_of_two_that_go_on_with_one_run_one_says_who_the_other_is(place, uninterrupted):
    """A requeued job beside its first life, again and again."""
    for steps in (6, 12, 18):
        begin_two(place, place / "both often", **{"training.num_steps": steps})
    assert_same_run(place / "both often", uninterrupted)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_used_by_nobody_and_the_one_before_only_when_told(place, uninterrupted):
    workdir = place / "damaged"
    shutil.copytree(uninterrupted, workdir)
    largest = max((workdir / "checkpoints" / "18" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    status, err = train(place, workdir)
    assert status == 1
    assert err.startswith(f"sedd train: checkpoint {workdir}/checkpoints/18 is damaged or cannot be read (")
    assert err.endswith("--step=16 uses the one before it\n")
    assert err.count("\n") == 1
    status, err = train(place, workdir, "--step=16")
    assert status == 0, err
    assert f"resumed {workdir} at step 16" in err
    assert_same_run(workdir, uninterrupted)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_names_the_last_good_step(place, long_uninterrupted, small_disk):
    workdir = small_disk / "run"
    status, err = train(place, workdir, **LONG, **{"training.keep_checkpoints": 40})
    assert status == 1
    last = err.splitlines()[-1]
    assert last.startswith("sedd train: ")
    assert "No space left on device" in last
    newest = int(last.rpartition("the newest checkpoint is of step ")[2].partition(";")[0])
    assert 2 <= newest < 42
    assert last.endswith(f"make room for {workdir}, then the same command goes on")
    # The lines before are progress of the run.
    assert all(line.startswith("step ") for line in err.splitlines()[:-1])
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    status, err = train(place, workdir, **LONG, **{"training.keep_checkpoints": 40})
    assert status == 0, err
    assert f"resumed {workdir} at step {newest}" in err
    assert_same_run(workdir, long_uninterrupted)


@pytest.mark.slow
def test_a_run_in_a_bucket_survives_the_loss_of_its_machine(place, long_uninterrupted, tmp_path):
    with gcs_emulator.Server("bucket") as server:
        # Each machine keeps its local copy of the run in its cache.
        first, second = (server.environment() | {"XDG_CACHE_HOME": str(tmp_path / name)} for name in ("one", "two"))
        workdir, seldom = "gs://bucket/runs/mine", LONG | {"training.checkpoint_every": 14}
        child = start(place, workdir, variables=first, **seldom)
        wait_for_steps(child, 32)
        child.kill()
        child.communicate()
        kept = [name for name in server.blobs if name.endswith("/commit_success.txt")]
        assert any(name.startswith("runs/mine/checkpoints/") for name in kept)
        status, err = train(place, workdir, variables=second, **seldom)
        assert status == 0, err
        assert f"resumed {workdir} at step" in err
        assert small_runs.without_speed(server.blobs["runs/mine/metrics.jsonl"].data.decode()) == small_runs.logged(
            long_uninterrupted
        )
        names = {name.split("/")[2] for name in server.blobs}
        assert names == {path.name for path in long_uninterrupted.iterdir()}
        environment = small_runs.environment() | first
        command = ["eval", f"--workdir={workdir}", "--num_times=2", "--json"]
        child = forks.server().start(*command, env=environment)
        out, err = child.communicate()
    assert child.returncode == 0, err
    found = json.loads(out.splitlines()[-1])
    expected = perplexity.evaluate(long_uninterrupted, settings=perplexity.Settings(num_times=2))
    assert found["workdir"] == workdir
    assert found["step"] == expected["step"]
    assert found["score_entropy"] == pytest.approx(expected["score_entropy"], rel=1e-4)


def test_a_bucket_that_is_not_there_is_named(place):
    with gcs_emulator.Server("bucket") as server:
        status, err = train(place, "gs://other/run", variables=server.environment())
    assert status == 1
    assert err.startswith("sedd train: gs://other/run: ")
    assert err.count("\n") == 1
