"""Checkpoints of a run. This is the only module that uses Orbax."""

import contextlib
import errno
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32
from orbax.checkpoint import checkpoint_managers

from sedd_jax.model import networks, train_state
from sedd_jax.runtime import device_failures, errors, interrupts, storage

# Saved as separate items, so that evaluation and sampling can read the moving average alone.
_TREES = ("params", "ema_params", "opt_state")
_ITEMS = ("progress", *_TREES)
# Orbax warns of what is meant here: checkpoints opened read-only, and a handler of our own.
logging.getLogger("absl").addFilter(lambda record: record.levelno > logging.WARNING or "orbax" not in record.pathname)
# Replicas share the writing of an array only if each part is at least a MiB: every part is a program to compile.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20), override=True
)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Always False. The training loop itself asks JAX, at every step.

        JAX counts each call, and Orbax would ask for older steps.
        """
        return False


class Checkpoints:
    """The checkpoints in a directory. They are saved asynchronously, and each is complete or absent.

    Args:
        directory: local or in a bucket; made if missing, unless this object is read-only.
        keep: how many of the newest checkpoints to keep; None keeps all and makes this object read-only.
        keep_every: checkpoints at multiples of this step are never deleted; 0 for none.
    """

    def __init__(self, directory: storage.Directory, *, keep: int | None = None, keep_every: int = 0):
        self._directory = directory if storage.is_remote(directory) else directory.absolute()
        policies: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            create=keep is not None,
            read_only=keep is None,
            cleanup_tmp_directories=keep is not None,  # Left by a process that was killed during a save.
        )
        self._manager = _Manager(self._directory, item_names=_ITEMS, options=options)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order."""
        return sorted(self._manager.all_steps(read=True))

    def find(self, step: int | None) -> int | None:
        """`step`, or if it is None the step of the newest complete checkpoint; None if there is none.

        Raises:
            errors.UserError: if there is no checkpoint of that step.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise errors.UserError(
                f"has no checkpoint in {self._directory}",
                field="step",
                value=step,
                remedy=f"those there are of steps {steps}",
            )
        return max(steps, default=None) if step is None else step

    def newest(self) -> str:
        """The step of the newest complete checkpoint, in words."""
        step = self.find(None)
        return "there is no checkpoint yet" if step is None else f"the newest checkpoint is of step {step}"

    def save(self, step: int, state: train_state.TrainState) -> None:
        """Starts saving a state, whose arrays may be donated as soon as this returns.

        Raises:
            OSError: if this or an earlier save failed.
            RuntimeError: if Orbax does not save, as it silently does for a step older than the newest.
        """
        items = {name: getattr(state, name) for name in _TREES}
        items["progress"] = {"step": state.step, "checksums": _checksums(items)}
        args = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
        with self._naming_failures(), interrupts.deferred():
            saved = self._manager.save(step, args=args)
        if not saved:
            raise RuntimeError(f"checkpoint of step {step} was not saved: {self._directory} holds {self.steps()}")

    def check(self) -> bool:
        """Whether no save is in progress. Raises OSError if one that has ended failed."""
        if self._manager.is_saving_in_progress():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Waits until no save is in progress; raises OSError if one failed."""
        with self._naming_failures(), interrupts.deferred():
            self._manager.wait_until_finished()

    def restore(self, step: int, like: train_state.TrainState) -> train_state.TrainState:
        """The state saved at `step`, with the shapes, dtypes and shardings of `like`.

        The leaves of `like` may be arrays or `jax.ShapeDtypeStruct`.

        Raises:
            errors.UserError: if the checkpoint is damaged; names it, and the step of the one before it.
        """
        items = self._restore(step, {name: getattr(like, name) for name in _TREES}, like.step.sharding)
        return train_state.TrainState(step=items.pop("progress")["step"], **items)

    def restore_params(self, step: int, like: networks.Params, name: str) -> networks.Params:
        """`params` or `ema_params` of the state saved at `step`, sharded as `like`; raises as `restore` does."""
        mesh = jax.tree.leaves(like)[0].sharding.mesh
        return self._restore(step, {name: like}, NamedSharding(mesh, PartitionSpec()))[name]

    def remove_after(self, step: int) -> None:
        """Deletes every checkpoint newer than `step`, so that a run can continue from it."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)

    def close(self) -> None:
        """Waits until no save is in progress and closes the directory; raises OSError if a save failed."""
        with self._naming_failures(), interrupts.deferred():
            self._manager.close()

    def _restore(self, step: int, trees: dict[str, Any], everywhere: NamedSharding) -> dict[str, Any]:
        """Progress and the given trees of a checkpoint, once their checksums are verified."""
        number = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
        abstract = jax.tree.map(_shape, trees)
        abstract["progress"] = {"step": number("int32"), "checksums": {name: number("uint32") for name in _TREES}}
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(item) for name, item in abstract.items()})
        try:
            with interrupts.deferred():
                items = dict(self._manager.restore(step, args=args).items())
        except Exception as error:
            _raise_what_devices_refused(error)
            raise self._damaged(step, f"{type(error).__name__}: {error}") from error
        missing = [name for name in abstract if name not in items]
        if missing:
            raise self._damaged(step, f"{missing[0]} is missing")
        found = jax.device_get(_checksums({name: items[name] for name in trees}))
        known = jax.device_get(items["progress"]["checksums"])
        wrong = [name for name in trees if found[name] != known[name]]
        if wrong:
            raise self._damaged(step, f"checksum of {wrong[0]} differs")
        return items

    def _damaged(self, step: int, why: str) -> errors.UserError:
        before = max((other for other in self.steps() if other < step), default=None)
        return errors.UserError(
            f"checkpoint {self._directory / str(step)} is damaged or cannot be read ({' '.join(why.split())[:150]})",
            remedy="there is none before it"
            if before is None
            else f"{errors.name('step')}={before} uses the one before it",
        )

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            _raise_what_devices_refused(error)
            why = " ".join(str(error).partition("[tensorstore_spec")[0].split())
            message = f"a checkpoint could not be written to {self._directory} ({why[-120:]})"
            raise OSError(errno.EIO, message) from error


def _raise_what_devices_refused(error: BaseException) -> None:
    """Raises what a device or a process that died refused during a save or a restore. The files are not at fault."""
    cause: BaseException | None = error
    while cause is not None:
        if device_failures.explained(cause, "train") is not None:
            raise cause
        cause = cause.__cause__ or cause.__context__


def _shape(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def checksum(params: networks.Params) -> int:
    """A checksum of parameters, the same on every mesh, by which measurements know what they are of."""
    return int(jax.device_get(_checksum(params)))


def _checksums(trees: dict[str, Any]) -> dict[str, UInt32[Array, ""]]:
    """`_checksum` of each tree."""
    return {name: _checksum(tree) for name, tree in trees.items()}


@jax.jit
def _checksum(tree: Any) -> UInt32[Array, ""]:
    """A checksum of a tree. A change of any one bit changes it, and it is the same on every mesh."""

    def of_leaf(leaf: Array) -> UInt32[Array, ""]:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        # Weights are odd, so that every bit counts modulo 2^32, and they differ between positions.
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)

    return functools.reduce(lambda total, leaf: total * 3 + of_leaf(leaf), jax.tree.leaves(tree), jnp.uint32(0))
