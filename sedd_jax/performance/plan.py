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
from sedd_jax.training import train_steps

_WIDTH = 28  # of the names in a table


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
    while train_steps.num_texts(training) % (2 * micro * slice_devices * num_slices) == 0:
        micro *= 2
        yield fields | {"training.num_micro_batches": micro}
    if split == 1:
        yield fields | {"training.num_micro_batches": micro} | splitting


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    config = result["config"]
    network, groups = config["network"], result["num_slices"] * result["num_hosts"]
    batch = config["sampling"]["num_samples"] if result["sample"] else config["training"]["batch_size"]
    devices = f"{f'{groups} x ' if groups > 1 else ''}{result['topology']}: {result['num_devices']} devices"
    lines = [
        f"{'sampling' if result['sample'] else 'training'} step of {network['hidden_size']} x {network['num_layers']}, "
        f"{batch} sequences of {config['data']['length']}, {result['vocab_size']} tokens, {network['dtype']}, "
        f"remat {network['remat']}",
        f"on {devices} ({result['accelerator']}), mesh "
        + ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items()),
        "",
    ]
    if not result["fits"]:
        lines.append(f"DOES NOT FIT: {result['why']}")
        if "remedy" in result:
            flags = " ".join(f"--config.{name}={value}" for name, value in result["remedy"].items())
            lines.append(f"fits with {flags}")
        elif not result["sample"]:
            lines.append("nor with remat=blocks, one sequence a device and micro-batch, and all arrays sharded")
        return "\n".join(lines)
    memory = result["memory_gib"]
    lines += [f"{'GiB a device':<22}{sum(memory.values()):>8.2f} of {result['hbm_gib']:.0f}: fits"]
    lines += [f"  {name:<20}{value:>8.2f}" for name, value in memory.items()]
    lines += [f"{'collectives a step':<28}{'number':>8}{'GB sent by a device':>22}"]
    lines += [
        f"  {kind:<26}{of['number']:>8}{of['bytes_sent'] / 1e9:>22.3f}" for kind, of in result["collectives"].items()
    ]
    lines += ["milliseconds at peak rates"]
    lines += [
        f"  {name:<20}" + ("no figure is published: not counted" if seconds is None else f"{1e3 * seconds:>8.1f}")
        for name, seconds in result["seconds"].items()
    ]
    lines += _time_lines(result["kernels"])
    estimate = result["estimate"]
    lines += [
        f"at best {_speed(result, result)}",
        f"estimate {1e3 * estimate['seconds']:.1f} ms a step, {_speed(estimate, result)}",
        f"  ({estimate['basis']})",
    ]
    return "\n".join(lines)


def _speed(of: dict[str, Any], result: dict[str, Any]) -> str:
    goal = (
        f"for samples of {result['num_steps']:,} steps"
        if result["sample"]
        else f"{of['days']:.1f} days for {result['config']['training']['num_steps']:,} steps"
    )
    return f"{of['tokens_per_second']:,.0f} tokens/s, {of['utilization']:.0%} of peak, {goal}"


def _time_lines(costs: dict[str, Any]) -> list[str]:
    """Where the time of a step's kernels goes."""
    head = f"{'ms':>8}{'calls':>8}{'GB':>8}{'TFLOP':>8}"
    lines = []
    for title, sums in (("time by kind of kernel", costs["kinds"]), ("by part of the step", costs["scopes"])):
        lines += [f"{title:<{_WIDTH}}{head}"]
        lines += [f"  {name:<{_WIDTH - 2}}{_numbers(of)}" for name, of in sums.items()]
    lines += [f"{'dearest kernels':<{_WIDTH}}{head}"]
    for of in costs["dearest"]:
        operation = "/".join(of["where"].split("/")[-2:])
        what = _shortened(f"{operation} {' '.join(of['arrays'])}")
        lines += [f"  {of['scope']:<{_WIDTH - 2}}{_numbers(of)}  {of['name']}: {what}"]
    return lines


def _numbers(of: dict[str, float]) -> str:
    moved = of["bytes_read"] + of["bytes_written"]
    return f"{1e3 * of['seconds']:>8.2f}{of['calls']:>8.0f}{moved / 1e9:>8.1f}{of['flops'] / 1e12:>8.2f}"


def _shortened(text: str, length: int = 70) -> str:
    return text if len(text) <= length else text[:length] + "..."
