"""Checkpoints of a run: the only file that knows Orbax."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32
from orbax.checkpoint import checkpoint_managers

from sedd_jax.model import networks, train_state
from sedd_jax.runtime import errors, storage

# Saved side by side, so that evaluation and sampling read the moving average alone.
_TREES = ("params", "ema_params", "opt_state")
_ITEMS = ("progress", *_TREES)
# Copies of an array share the work of writing it only where each gets a MiB: every part is a program to compile.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20), override=True
)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: the training loop asks, at every step. JAX counts each call, and Orbax would ask for older steps."""
        return False


class Checkpoints:
    """The checkpoints in a directory: saved asynchronously, each complete or absent.

    Args:
        directory: where they are, local or in a bucket; made if missing.
        keep: newest checkpoints kept; None keeps all and only reads.
        keep_every: checkpoints at multiples of this step are kept for good; 0 keeps none of them.
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
            cleanup_tmp_directories=keep is not None,  # What a kill in the middle of a save has left.
        )
        self._manager = _Manager(self._directory, item_names=_ITEMS, options=options)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are complete on disk, in order."""
        return sorted(self._manager.all_steps(read=True))

    def find(self, step: int | None) -> int | None:
        """`step`, or if None that of the newest complete checkpoint; None where there is none.

        Raises:
            errors.UserError: where there is no checkpoint of that step.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise errors.UserError(
                f"has no checkpoint: those in {self._directory} are of steps {steps}", field="step", value=step
            )
        return max(steps, default=None) if step is None else step

    def save(self, step: int, state: train_state.TrainState) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Raises:
            OSError: where this or an earlier save failed.
            RuntimeError: where Orbax declines, as it does in silence for a step older than the newest.
        """
        items = {name: getattr(state, name) for name in _TREES}
        items["progress"] = {"step": state.step, "checksums": _checksums(items)}
        args = ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
        with self._naming_failures():
            saved = self._manager.save(step, args=args)
        if not saved:
            raise RuntimeError(f"checkpoint of step {step} was not saved: {self._directory} holds {self.steps()}")

    def check(self) -> None:
        """Raises OSError where a save that has ended failed."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for saves under way; raises OSError where one failed."""
        with self._naming_failures():
            self._manager.wait_until_finished()

    def restore(self, step: int, like: train_state.TrainState) -> train_state.TrainState:
        """The state saved at `step`, with the shapes, dtypes and shardings of `like` (arrays, or only their shapes).

        Raises:
            errors.UserError: names a damaged checkpoint, and the step of the one before it.
        """
        items = self._restore(step, {name: getattr(like, name) for name in _TREES}, like.step.sharding)
        return train_state.TrainState(step=items.pop("progress")["step"], **items)

    def restore_params(self, step: int, like: networks.Params, name: str) -> networks.Params:
        """`params` or `ema_params` of the state saved at `step`, laid out as `like`; raises as `restore`."""
        mesh = jax.tree.leaves(like)[0].sharding.mesh
        return self._restore(step, {name: like}, NamedSharding(mesh, PartitionSpec()))[name]

    def remove_after(self, step: int) -> None:
        """Removes every checkpoint newer than `step`, so that a run can go on from it."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)

    def close(self) -> None:
        """Waits for saves under way; raises OSError where one failed."""
        with self._naming_failures():
            self._manager.close()

    def _restore(self, step: int, trees: dict[str, Any], everywhere: NamedSharding) -> dict[str, Any]:
        """Progress and some of the trees of a checkpoint, their checksums compared."""
        number = lambda dtype: jax.ShapeDtypeStruct((), dtype, sharding=everywhere)
        abstract = jax.tree.map(_shape, trees)
        abstract["progress"] = {"step": number("int32"), "checksums": {name: number("uint32") for name in _TREES}}
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(item) for name, item in abstract.items()})
        try:
            items = dict(self._manager.restore(step, args=args).items())
        except Exception as error:
            raise self._damaged(step, f"{type(error).__name__}: {error}") from error
        missing = [name for name in abstract if name not in items]
        if missing:
            raise self._damaged(step, f"{missing[0]} is missing")
        found = jax.device_get(_checksums({name: items[name] for name in trees}))
        known = jax.device_get(items["progress"]["checksums"])
        wrong = [name for name in trees if found[name] != known[name]]
        if wrong:
            raise self._damaged(step, f"checksum of {wrong[0]}")
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
            why = " ".join(str(error).partition("[tensorstore_spec")[0].split())
            raise OSError(f"a checkpoint could not be written to {self._directory} ({why[-120:]})") from error


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@jax.jit
def _checksums(trees: dict[str, Any]) -> dict[str, UInt32[Array, ""]]:
    """A number for each tree that a change of any bit changes, the same on every mesh."""

    def of_leaf(leaf: Array) -> UInt32[Array, ""]:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        # Weights are odd, so that no bit's contribution is lost, and differ from place to place.
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, size in enumerate(bits.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)

    def of_tree(tree: Any) -> UInt32[Array, ""]:
        return functools.reduce(lambda total, leaf: total * 3 + of_leaf(leaf), jax.tree.leaves(tree), jnp.uint32(0))

    return {name: of_tree(tree) for name, tree in trees.items()}
