"""The device mesh and the one table that says how every array lies on it.

Axes: "data" (copies of the model), "fsdp" (the model's arrays are split and gathered where they are used) and "tensor"
(heads, MLP columns and vocabulary are split). A batch is split over data and fsdp together.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sedd_jax.runtime import errors

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Path of a parameter -> axes of its last dimensions. EMA and Adam moments carry the same paths inside theirs. The
# leading axis of everything under "blocks" is the layer and is never split.
RULES = (
    (r"embedding$", ("tensor", "fsdp")),
    (r"head_kernel$", ("fsdp", "tensor")),
    (r"head_bias$", ("tensor",)),
    (r"blocks/qkv/kernel$", ("fsdp", "tensor")),
    (r"blocks/attention_out/kernel$", ("tensor", "fsdp")),
    (r"blocks/mlp_in/kernel$", ("fsdp", "tensor")),
    (r"blocks/mlp_in/bias$", ("tensor",)),
    (r"blocks/mlp_out/kernel$", ("tensor", "fsdp")),
    (r"(modulation|final_modulation|sigma_embedding/(in|out))/kernel$", (None, "fsdp")),
    (r"(norm|bias|count|step)$", ()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis.

    Attributes:
        data: copies of the model; -1 takes what the others leave.
        fsdp: parts the model's arrays are split into, gathered where they are used.
        tensor: parts that heads, MLP columns and vocabulary are split into.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices (or of those given) in the shape the config asks for.

    Raises:
        errors.UserError: where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    for axis, size in zip(AXES, sizes, strict=True):
        if size < 1 and (size != -1 or sizes.count(-1) > 1):
            raise errors.UserError("must be positive, with at most one -1", field=f"config.mesh.{axis}", value=size)
    known = math.prod(size for size in sizes if size != -1)
    shape = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(shape) != len(devices):
        raise errors.UserError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not fill {len(devices)} devices",
            remedy=f"set {errors.name('config.mesh.data')}=-1 or change a size",
        )
    axis_types = (AxisType.Auto,) * 3
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return jax.make_mesh(tuple(shape), AXES, axis_types=axis_types, devices=devices)
    # Only gradients cross the slow network between slices: each holds whole copies of the model.
    if shape[0] % num_slices:
        raise errors.UserError(
            f"must be divisible by the {num_slices} slices",
            field="config.mesh.data",
            value=shape[0],
            remedy="make fsdp x tensor fit into one",
        )
    within = (shape[0] // num_slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (num_slices, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=axis_types)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of params, EMA, optimizer state or a whole train state.

    Raises:
        ValueError: where no rule matches a leaf's path.
    """

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)
        for pattern, axes in RULES:
            if re.search(pattern, name):
                return NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - len(axes)), *axes))
        raise ValueError(f"no sharding rule matches the parameter {name!r}: add one to sharding.RULES")

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def shapes_on(mesh: Mesh, tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays or shapes, laid out on the mesh by the rules."""
    return jax.tree.map(
        lambda leaf, spread: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread),
        tree,
        tree_shardings(mesh, tree),
    )


def batch_sharding(mesh: Mesh, batch_axis: int = 0) -> NamedSharding:
    """The sharding of an array whose given axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * batch_axis, BATCH_AXES))


def num_batch_devices() -> int:
    """Devices over which the current mesh splits a batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an intermediate array to the current mesh, "batch" meaning the batch axes.

    Without a mesh it is x, and a batch that the devices do not divide (a few samples on many devices) is not pinned.
    """
    if jax.sharding.get_abstract_mesh().empty or (
        "batch" in axes and x.shape[axes.index("batch")] % num_batch_devices()
    ):
        return x
    spec = PartitionSpec(*(BATCH_AXES if axis == "batch" else axis for axis in axes))
    return jax.lax.with_sharding_constraint(x, spec)


def replicate(x: jax.Array) -> jax.Array:
    """Pins an intermediate array to be whole on every device of the current mesh."""
    return constrain(x, *(None,) * x.ndim)


def mapped_axes(batch_size: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of the current mesh that `per_device` splits a batch and a vocabulary over; none without a mesh.

    A batch that the devices do not divide is whole on all of them; `jax.export` may give a symbol for its size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return (), ()
    return () if batch_size % num_batch_devices() else BATCH_AXES, ("tensor",)


def axis_size(axes: tuple[str, ...]) -> int:
    """Devices along axes of the current mesh together."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def per_device(fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """fn on each device's part of its arguments, free to name axes of the current mesh; without a mesh, fn itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return fn
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def platform() -> str:
    """What the program is compiled for, cpu, gpu or tpu: the current mesh's, which need not be this machine's."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform
