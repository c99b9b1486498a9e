"""Checkpoints of a run: the only file that knows Orbax."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from sedd_jax import networks, train_state

# Saved side by side, so that evaluation and sampling read the moving average alone.
_ITEMS = ("progress", "params", "ema_params", "opt_state")


class Checkpoints:
    """The checkpoints in a directory: saved asynchronously, each complete or absent.

    Args:
        directory: where they are; made if missing.
        keep: newest checkpoints kept; None keeps all and only reads.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int | None = None):
        self._directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None, read_only=keep is None)
        self._manager = ocp.CheckpointManager(self._directory, item_names=_ITEMS, options=options)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: train_state.TrainState) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Raises:
            RuntimeError: where Orbax declines, as it does in silence for a step older than the newest.
        """
        items = {
            "progress": {"step": state.step},
            "params": state.params,
            "ema_params": state.ema_params,
            "opt_state": state.opt_state,
        }
        saved = self._manager.save(
            step, args=ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in items.items()})
        )
        if not saved:
            raise RuntimeError(f"checkpoint of step {step} was not saved: {self._directory} holds {self.latest_step()}")

    def restore(self, step: int, like: train_state.TrainState) -> train_state.TrainState:
        """The state saved at `step`, with the shapes, dtypes and shardings of `like` (arrays, or only their shapes)."""
        abstract = {
            "progress": {"step": like.step},
            "params": like.params,
            "ema_params": like.ema_params,
            "opt_state": like.opt_state,
        }
        items = self._restore(step, abstract)
        return train_state.TrainState(
            step=items["progress"]["step"],
            params=items["params"],
            ema_params=items["ema_params"],
            opt_state=items["opt_state"],
        )

    def restore_ema(self, step: int, like: networks.Params) -> networks.Params:
        """The moving average saved at `step`, with the shapes, dtypes and shardings of `like`."""
        return self._restore(step, {"ema_params": like})["ema_params"]

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _restore(self, step: int, abstract: dict[str, Any]) -> Any:
        args = {name: ocp.args.StandardRestore(_abstract(item)) for name, item in abstract.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**args))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
