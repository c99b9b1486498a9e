"""A strict harness: eight CPU devices and checked shapes; rank promotion, key reuse and warnings are errors."""

import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile

from tests.support import checking, compiling

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has started the tests in the background. The processes that they interrupt would ignore it, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Workers, and the processes that tests start, share what they compile until the last test has ended.
    _shared = tempfile.TemporaryDirectory(prefix="sedd-tests-")
    compiled = os.path.join(_shared.name, "compiled")
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # Each process would compile the whole package to bytecode.

import jax
import jaxtyping
import pytest

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Cores of its own for each worker: their compilers' threads would take turns on all, at a tenth more of the time.
    _number, _count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, _cores[_number::_count] or [_cores[_number % len(_cores)]])

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jaxtyping.install_import_hook("sedd_jax", f"{checking.__name__}.{checking.on_first_call.__name__}")


def pytest_configure(config):
    """JAX reads these flags with its first array."""
    compiling.choose_level(config.option.markexpr)
    os.environ["XLA_FLAGS"] = compiling.flags(num_devices=8)


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount the small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def golden():
    """Loads a recorded file by its name."""
    from tests.support import goldens  # Not at the top: it imports sedd_jax, and the hook must be installed first.

    return goldens.load


@pytest.fixture(scope="session")
def code_run(tmp_path_factory):
    """The directory of a run of two steps. Its training text is Python; half of its held-out text does not parse."""

    def train(directory):
        (directory / "train.txt").write_text("a = 1\nb = 22\n" * 500)
        for split in ("valid", "test"):
            (directory / f"{split}.txt").write_text("a = 1\nb = 22\n" * 60 + "a = = 1\n" * 60)
        _train_two_steps(directory / "run", f"text:{directory}/{{split}}.txt")

    return _copy_of_shared("code", train, tmp_path_factory)


@pytest.fixture(scope="session")
def judge_run(code_run, tmp_path_factory):
    """The directory of an autoregressive run of two steps on the same text."""
    from sedd_jax import runs

    settings = {"graph.name": "autoregressive", "network.scale_by_sigma": False}
    source = runs.load(code_run).config.data.source
    train = lambda directory: _train_two_steps(directory / "run", source, **settings)
    return _copy_of_shared("judge", train, tmp_path_factory)


def _copy_of_shared(name, train, tmp_path_factory):
    """A copy of a run, which `train` makes as DIRECTORY/run once for all workers."""
    shared = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).parent / name
    with open(f"{shared}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            shared.mkdir()
            train(shared)
    return shutil.copytree(shared / "run", tmp_path_factory.mktemp(name) / "run")


def _train_two_steps(workdir, source, **settings):
    from sedd_jax.cli import main as cli

    settings |= {
        "data.source": source,
        "data.tokenizer": "characters",
        "data.length": 32,
        "network.hidden_size": 32,
        "network.num_heads": 2,
        "network.num_layers": 1,
        "network.dtype": "float32",
        "training.num_steps": 2,
        "training.batch_size": 8,
        "training.eval_every": 0,
        "training.sample_every": 0,
        "sampling.num_steps": 4,
    }
    arguments = ["--num_processes=1", *(f"--config.{name}={value}" for name, value in settings.items())]
    assert cli.main(["train", f"--workdir={workdir}", *arguments]) == 0
