"""Whether a config fits TPUs or GPUs, and what a step costs there, on a machine that has none.

The real training step (or sampling step) is compiled for these devices. Memory, collectives and kernels come from the
compiled program. Times are lower bounds from peak rates, and a sum over the kernels.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax

from sedd_jax import config as configs
from sedd_jax.data import tokenizers
from sedd_jax.performance import compiled_steps, gpus, slices
from sedd_jax.runtime import accelerators, errors


def plan(
    config: configs.Config,
    *,
    topology: str,
    num_slices: int = 1,
    num_hosts: int = 1,
    vocab_size: int | None = None,
    sample: bool = False,
) -> dict[str, Any]:
    """Compiles a config's training step for TPUs or GPUs. If it does not fit, finds changes that make it fit.

    Args:
        config: a validated config.
        topology: TPU generation and chips along each axis, such as "v5e:4x4", or GPU and their number in a host, such
            as "h100:8".
        num_slices: number of TPU slices of that shape, connected by the data centre's network.
        num_hosts: number of hosts with so many GPUs.
        vocab_size: tokens without the mask; the tokenizer's if None.
        sample: compile a sampling step of sampling.num_samples sequences instead of the training step.

    Returns:
        Whether it fits; GiB per device by kind; collectives by kind with the bytes a device sends in a step; seconds
        that arithmetic, memory and networks need at their peak rates. From the slowest of these: tokens/s (of finished
        samples for a sampling step), utilization, and days of training. "kernels" says where time goes (see `costs`),
        and "estimate" how long the step takes by them.

    Raises:
        errors.UserError: if the devices do not exist or do not divide the batch.
    """
    vocab_size = tokenizers.vocab_size_of(config.data.tokenizer) if vocab_size is None else vocab_size
    for name, value in (("num_slices", num_slices), ("num_hosts", num_hosts), ("vocab_size", vocab_size)):
        if value < 1:
            raise errors.UserError("must be at least 1", field=name, value=value)
    check_topology(topology, num_slices, num_hosts)
    devices = make_devices(topology, num_slices, num_hosts)
    accelerator = accelerators.find(devices[0].device_kind)
    assert accelerator is not None, devices[0].device_kind
    result = {
        "topology": topology,
        "num_slices": num_slices,
        "num_hosts": num_hosts,
        "num_devices": len(devices),
        "accelerator": accelerator.name,
        "config": configs.to_dict(config),
        "vocab_size": vocab_size,
        "sample": sample,
    }
    result |= compiled_steps.compile_step(config, vocab_size, devices, sample)
    if not result["fits"] and not sample:
        groups = num_slices * num_hosts
        for fields in remedies(config, len(devices) // groups, groups):
            changed = configs.parse(configs.merge(configs.flatten(configs.to_dict(config)) | fields))
            if compiled_steps.compile_step(changed, vocab_size, devices, sample)["fits"]:
                return result | {"remedy": fields}
    return result


def check_topology(topology: str, num_slices: int = 1, num_hosts: int = 1) -> None:
    """Raises errors.UserError, which says what is known, if a topology is none."""
    name = topology.partition(":")[0]
    if name not in slices.SLICES and name not in gpus.GPUS:
        raise errors.UserError(
            "is no such TPU or GPU",
            field="topology",
            value=topology,
            remedy=f"known are {', '.join(slices.SLICES)}, with chips along each axis: v5e:4x4, v5p:2x2x2; and "
            f"{', '.join(gpus.GPUS)}, with the number of GPUs of a host: h100:8",
        )
    if name in gpus.GPUS and num_slices != 1:
        remedy = f"{errors.name('num_hosts')}=N for several hosts of GPUs"
        raise errors.UserError("is for TPUs", field="num_slices", value=num_slices, remedy=remedy)
    if name in slices.SLICES and num_hosts != 1:
        remedy = f"a larger slice has more hosts, and {errors.name('num_slices')}=N several slices"
        raise errors.UserError("is for GPUs", field="num_hosts", value=num_hosts, remedy=remedy)
    (gpus if name in gpus.GPUS else slices).check_topology(topology)


def make_devices(topology: str, num_slices: int = 1, num_hosts: int = 1) -> list[jax.Device]:
    """Devices to compile for. They need not exist here.

    Raises:
        errors.UserError: if the compiler for these devices is not installed.
    """
    if topology.partition(":")[0] in gpus.GPUS:
        return gpus.make_devices(topology, num_hosts)
    return slices.make_devices(topology, num_slices)


def remedies(config: configs.Config, slice_devices: int, num_slices: int) -> Iterator[dict[str, Any]]:
    """Changes of fields that reduce the memory of a training step, the one that costs the least time first.

    A slice of TPUs or a host of GPUs has `slice_devices`, and there are `num_slices` of them.
    """
    fields: dict[str, Any] = {}
    if config.network.remat != "blocks":
        fields["network.remat"] = "blocks"
        yield dict(fields)
    training, split = config.training, config.mesh.fsdp * config.mesh.tensor
    # FSDP stays within a slice or a host. The number of parts must divide the sizes of the arrays.
    fsdp = math.gcd(config.network.hidden_size, config.network.cond_dim, slice_devices)
    splitting = {"mesh.data": slice_devices // fsdp * num_slices, "mesh.fsdp": fsdp}
    if split == 1:
        yield fields | splitting
    micro = training.num_micro_batches
    while training.batch_size % (2 * micro * slice_devices * num_slices) == 0:
        micro *= 2
        yield fields | {"training.num_micro_batches": micro}
    if split == 1:
        yield fields | {"training.num_micro_batches": micro} | splitting
