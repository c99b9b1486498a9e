"""The device mesh, and the table of rules that shards every array over it.

Axes: "data" (copies of the model), "fsdp" (the model's arrays are split, and gathered where they are used) and "tensor"
(attention heads, MLP columns and the vocabulary are split). A batch is split over "data" and "fsdp" together.
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

# Pattern of a parameter's path -> mesh axes of its last dimensions. The paths of the EMA and the Adam moments contain
# that of their parameter. Arrays under "blocks" have a leading layer axis, which is never split.
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
    (r"(norm|bias|count|step|ns_coeffs|squares|counts)$", ()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis.

    Attributes:
        data: copies of the model; -1 uses the devices that the other axes leave.
        fsdp: parts into which the model's arrays are split; they are gathered where they are used.
        tensor: parts into which attention heads, MLP columns and the vocabulary are split.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices, or of those given, in the shape that the config asks for.

    Raises:
        errors.UserError: if a size is not positive, or the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    for axis, size in zip(AXES, sizes, strict=True):
        if size < 1 and (size != -1 or sizes.count(-1) > 1):
            raise errors.UserError(
                "must be positive, or -1 for at most one axis", field=f"config.mesh.{axis}", value=size
            )
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
    # Each slice holds whole copies of the model, so only gradients cross the slow network between slices.
    if shape[0] % num_slices:
        raise errors.UserError(
            f"must be divisible by the {num_slices} slices",
            field="config.mesh.data",
            value=shape[0],
            remedy="make fsdp x tensor fit into one slice",
        )
    within = (shape[0] // num_slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(within, (num_slices, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=axis_types)


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a tree: parameters, EMA, optimizer state or a whole train state.

    Raises:
        errors.UserError: if an axis of the mesh does not divide the size that it splits.
        ValueError: if no rule matches a leaf's path.
    """

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)
        for pattern, axes in RULES:
            if re.search(pattern, name):
                for size, axis in zip(leaf.shape[leaf.ndim - len(axes) :], axes, strict=True):
                    if axis is not None and size % mesh.shape[axis]:
                        raise errors.UserError(
                            f"does not divide a size of {size} in {name}",
                            field=f"config.mesh.{axis}",
                            value=mesh.shape[axis],
                            remedy="give a divisor of it, or change the network's sizes",
                        )
                return NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - len(axes)), *axes))
        raise ValueError(f"no sharding rule matches the parameter {name!r}: add one to sharding.RULES")

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def shapes_on(mesh: Mesh, tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays or shapes, sharded over the mesh by the rules."""
    return jax.tree.map(
        lambda leaf, spread: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread),
        tree,
        tree_shardings(mesh, tree),
    )


def batch_sharding(mesh: Mesh, batch_axis: int = 0) -> NamedSharding:
    """The sharding of an array whose axis `batch_axis` is the batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * batch_axis, BATCH_AXES))


def num_batch_devices() -> int:
    """Number of devices over which the current mesh splits a batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an intermediate array on the current mesh; "batch" stands for the batch axes.

    Without a mesh, x is returned as it is. So it is if the devices do not divide the batch (a few samples on many
    devices).
    """
    if jax.sharding.get_abstract_mesh().empty or (
        "batch" in axes and x.shape[axes.index("batch")] % num_batch_devices()
    ):
        return x
    spec = PartitionSpec(*(BATCH_AXES if axis == "batch" else axis for axis in axes))
    return jax.lax.with_sharding_constraint(x, spec)


def replicate(x: jax.Array) -> jax.Array:
    """Constrains an intermediate array to be replicated on every device of the current mesh."""
    return constrain(x, *(None,) * x.ndim)


def mapped_axes(batch_size: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes over which `per_device` splits a batch, and those for a vocabulary; empty without a mesh.

    A batch that the devices do not divide is replicated. `jax.export` may pass a symbol as the batch size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return (), ()
    return () if batch_size % num_batch_devices() else BATCH_AXES, ("tensor",)


def axis_size(axes: tuple[str, ...]) -> int:
    """Number of devices along these axes of the current mesh together."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def per_device(fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A function that runs fn on each device's shard of the arguments (`jax.shard_map`); fn itself without a mesh.

    fn may use the axes of the current mesh by name.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return fn
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def platform() -> str:
    """The platform that the program is compiled for: "cpu", "gpu" or "tpu".

    It is that of the current mesh, whose devices may not be on this machine.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def device_kind() -> str:
    """`jax.Device.device_kind` of the devices that the program is compiled for; see `platform`."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0].device_kind if mesh.empty else mesh.abstract_device.device_kind
