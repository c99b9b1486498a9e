"""Checkpoints: which are kept, errors for damaged ones, and errors of a directory that cannot be written."""

import contextlib
import gc
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import checkpoints
from sedd_jax.model import train_state
from sedd_jax.runtime import sharding
from tests.support import slow

# After a failure Python also reports exceptions in leftover threads of Orbax.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
MESHES = {"one": (1, 1, 1), "split": (2, 2, 2)}


@pytest.fixture(autouse=True)
def leave_nothing():
    yield
    gc.collect()  # While the filter above is active.


def arrays(seed):
    """Parameters with names that `sharding.RULES` covers, one of each kind of layout."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "embedding": draw(256, 32),
        "head_bias": draw(256),
        "blocks": {"qkv": {"kernel": draw(2, 32, 96)}, "norm": draw(2, 32)},
    }


def state(step, mesh=None):
    trees = [arrays(10 * step + number) for number in range(3)]
    made = train_state.TrainState(
        step=jnp.int32(step), params=trees[0], ema_params=trees[1], opt_state={"mu": trees[2], "count": jnp.int32(step)}
    )
    mesh = make_mesh("one") if mesh is None else mesh
    return jax.device_put(made, sharding.tree_shardings(mesh, made))


def make_mesh(name):
    sizes = MESHES[name]
    config = sharding.MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    return sharding.make_mesh(config, jax.devices()[: np.prod(sizes)])


def save(directory, *steps, **options):
    with contextlib.closing(checkpoints.Checkpoints(directory, **{"keep": 9} | options)) as saved:
        for step in steps:
            saved.save(step, state(step))


def restore(directory, step, like=None):
    with contextlib.closing(checkpoints.Checkpoints(directory)) as saved:
        return saved.restore(step, state(0) if like is None else like)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints") / "two"
    save(directory, 1, 2)
    return directory


@pytest.mark.parametrize("name", MESHES)
def test_a_checkpoint_is_restored_on_any_mesh(saved_twice, name):
    like = state(0, make_mesh(name))
    found = restore(saved_twice, 2, like)
    assert_same(found, state(2))
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_what_a_mesh_has_saved_one_device_reads(tmp_path):
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=1)) as saved:
        saved.save(5, state(5, make_mesh("split")))
    assert_same(restore(tmp_path, 5), state(5))
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        assert_same(saved.restore_params(5, state(0).ema_params, "ema_params"), state(5).ema_params)


def test_the_newest_are_kept_and_every_so_many_for_good(tmp_path):
    save(tmp_path, *range(1, 8), keep=2, keep_every=3)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        assert saved.steps() == [3, 6, 7]
        assert saved.find(None) == 7
        assert saved.find(3) == 3
        with pytest.raises(ValueError, match=r"step=4 has no checkpoint in .*: those there are of steps \[3, 6, 7\]"):
            saved.find(4)


def test_an_older_step_is_not_left_out_in_silence(saved_twice):
    with (
        contextlib.closing(checkpoints.Checkpoints(saved_twice, keep=3)) as saved,
        pytest.raises(RuntimeError, match="checkpoint of step 1 was not saved"),
    ):
        saved.save(1, state(1))


def test_newer_ones_are_removed(tmp_path):
    save(tmp_path, 1, 2, 3)
    with contextlib.closing(checkpoints.Checkpoints(tmp_path, keep=9)) as saved:
        saved.remove_after(1)
        assert saved.steps() == [1]
        saved.save(2, state(7))
    assert_same(restore(tmp_path, 2), state(7))


def test_what_a_kill_leaves_of_a_save_is_no_checkpoint_and_is_cleared(saved_twice, tmp_path):
    directory = tmp_path / "killed"
    shutil.copytree(saved_twice, directory)
    shutil.copytree(directory / "2", directory / "3.orbax-checkpoint-tmp")
    with contextlib.closing(checkpoints.Checkpoints(directory)) as saved:
        assert saved.steps() == [1, 2]
    with contextlib.closing(checkpoints.Checkpoints(directory, keep=9)) as saved:
        assert saved.find(None) == 2
        saved.save(4, state(4))
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "4"]


def files_of(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", slow.all_but(["flipped"], ["missing", "truncated", "flipped"]))
def test_damage_is_found_and_the_one_before_named(saved_twice, tmp_path, how):
    """Whichever file is damaged, an error names the checkpoint, or the file held nothing that matters.

    Of the three trees, only one is damaged, because all are saved alike.
    """
    expected, refused = state(2), 0
    files = [file for file in files_of(saved_twice / "2") if file.parts[0] not in ("ema_params", "opt_state")]
    for number, file in enumerate(files):
        directory = tmp_path / str(number)
        shutil.copytree(saved_twice, directory)
        damage(directory / "2" / file, how)
        message = ""
        try:
            found = restore(directory, 2)
        except ValueError as error:
            message = str(error)
        if message:
            assert re.search(
                rf"{directory}/2 is damaged or cannot be read \(.*\): step=1 uses the one before it", message
            )
            refused += 1
        else:
            assert_same(found, expected)
    assert_same(restore(directory, 1), state(1))
    # At least the array data of both items.
    assert refused >= 2


def test_a_damaged_checkpoint_with_none_before_it(saved_twice, tmp_path):
    directory = tmp_path / "one"
    shutil.copytree(saved_twice / "2", directory / "2")
    shutil.rmtree(directory / "2" / "opt_state")
    with pytest.raises(ValueError, match=r"2 is damaged or cannot be read \(.*\): there is none before it"):
        restore(directory, 2)
    with contextlib.closing(checkpoints.Checkpoints(directory)) as saved:
        assert_same(saved.restore_params(2, state(0).ema_params, "ema_params"), state(2).ema_params)


@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: AllGather failed: [external/gloo/transport/tcp/pair.cc:538] Read error: Connection reset by peer",
        "RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes",
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_devices_and_other_processes_refuse_is_no_fault_of_the_files(saved_twice, monkeypatch, message, wrapped):
    refusal = jax.errors.JaxRuntimeError(message)

    def refuse(*_, **__):
        if wrapped:
            raise ValueError("a worker failed") from refusal
        raise refusal

    with contextlib.closing(checkpoints.Checkpoints(saved_twice)) as saved, monkeypatch.context() as patch:
        for name in ("save", "restore", "wait_until_finished"):
            patch.setattr(saved._manager, name, refuse)
        patch.setattr(jax, "process_count", lambda: 2)
        for act in (lambda: saved.save(3, state(3)), saved.wait, lambda: saved.restore(2, state(0))):
            with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)):
                act()


def test_an_interrupt_while_a_checkpoint_is_read_is_no_damage(saved_twice, monkeypatch):
    """The library that reads made another exception of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.closing(checkpoints.Checkpoints(saved_twice)) as saved:
        read = saved._manager.restore

        def interrupted(*given, **named):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt as interrupt:
                raise ValueError("error while reading") from interrupt
            return read(*given, **named)

        monkeypatch.setattr(saved._manager, "restore", interrupted)
        try:
            with pytest.raises(KeyboardInterrupt):
                saved.restore(1, state(0))
        finally:
            signal.signal(signal.SIGINT, before)


def test_a_full_disk_is_told_and_loses_nothing(small_disk):
    directory = small_disk / "checkpoints"
    with pytest.raises(OSError, match=rf"could not be written to {directory} \(.*No space left on device"):
        save(directory, *range(1, 30))
    with contextlib.closing(checkpoints.Checkpoints(directory, keep=9)) as saved:
        newest = saved.find(None)
        assert 1 <= newest < 29
    assert_same(restore(directory, newest), state(newest))


def test_a_failed_save_is_noticed_before_the_next(small_disk):
    saved = checkpoints.Checkpoints(small_disk / "checkpoints", keep=9)
    saved.save(1, state(1))
    saved.wait()
    with contextlib.suppress(OSError), (small_disk / "filling").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    saved.save(2, state(2))
    ends = time.monotonic() + 60

    def check_often():
        while time.monotonic() < ends:
            saved.check()
            time.sleep(0.05)

    with pytest.raises(OSError, match="No space left"):
        check_often()
    assert saved.steps() == [1]
    with pytest.raises(OSError, match="No space left"):
        saved.close()
