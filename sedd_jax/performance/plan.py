"""Whether a config fits a TPU slice and what a step costs there at best, on a machine that has none.

The real training step (or sampling step) is compiled for the slice; memory and collectives are the compiler's, time is
a floor from what one chip can do.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.data import tokenizers
from sedd_jax.diffusion import steps
from sedd_jax.model import networks
from sedd_jax.performance import collectives
from sedd_jax.runtime import accelerators, hosts, sharding
from sedd_jax.sampling import generate, trajectories
from sedd_jax.training import train

# What libtpu knows and Google lends: axes of a slice, its chips at most, shapes to show.
_FLAT = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
_DEEP = "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8 and so on"
SLICES = {
    "v4": (3, 4096, _DEEP),
    "v5e": (2, 256, _FLAT),
    "v5p": (3, 6144, _DEEP),
    "v6e": (2, 256, _FLAT),
    "tpu7x": (3, 9216, _DEEP),
}


def plan(
    config: configs.Config, *, topology: str, num_slices: int = 1, vocab_size: int | None = None, sample: bool = False
) -> dict[str, Any]:
    """Compiles a config's training step for a TPU slice; where it does not fit, looks for a change that makes it fit.

    Args:
        config: a validated config.
        topology: generation and chips along each axis, such as "v5e:4x4".
        num_slices: slices of that shape, connected by the data centre's network.
        vocab_size: tokens, the mask left out; the tokenizer's if None.
        sample: compile one sampling step (sampling.num_samples) instead of the training step.

    Returns:
        Whether it fits; GiB a device by kind; collectives by kind with bytes a device sends in a step; seconds that
        arithmetic, memory and networks need at their peaks; tokens/s (of finished samples, where sampling), utilization
        and days of training that the slowest of them allows.

    Raises:
        ValueError: where the slice does not exist or its devices do not divide the batch.
    """
    vocab_size = tokenizers.vocab_size_of(config.data.tokenizer) if vocab_size is None else vocab_size
    for name, value in (("num_slices", num_slices), ("vocab_size", vocab_size)):
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    check_topology(topology)
    devices = make_devices(topology, num_slices)
    accelerator = accelerators.find(devices[0].device_kind)
    assert accelerator is not None, devices[0].device_kind
    result = {
        "topology": topology,
        "num_slices": num_slices,
        "num_devices": len(devices),
        "accelerator": accelerator.name,
        "config": configs.to_dict(config),
        "vocab_size": vocab_size,
        "sample": sample,
    }
    result |= _compile(config, vocab_size, devices, accelerator, sample)
    if not result["fits"] and not sample:
        for fields in remedies(config, len(devices) // num_slices, num_slices):
            changed = configs.parse(configs.merge(configs.flatten(configs.to_dict(config)) | fields))
            if _compile(changed, vocab_size, devices, accelerator, sample)["fits"]:
                return result | {"remedy": fields}
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    config = result["config"]
    network, slices = config["network"], f"{result['num_slices']} x " if result["num_slices"] > 1 else ""
    batch = config["sampling"]["num_samples"] if result["sample"] else config["training"]["batch_size"]
    lines = [
        f"{'sampling' if result['sample'] else 'training'} step of {network['hidden_size']} x {network['num_layers']}, "
        f"{batch} sequences of {config['data']['length']}, {result['vocab_size']} tokens, {network['dtype']}, "
        f"remat {network['remat']}",
        f"on {slices}{result['topology']}: {result['num_devices']} devices ({result['accelerator']}), mesh "
        + ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items()),
        "",
    ]
    if not result["fits"]:
        lines.append(f"DOES NOT FIT: {result['why']}")
        if "remedy" in result:
            flags = " ".join(f"--config.{name}={value}" for name, value in result["remedy"].items())
            lines.append(f"fits with {flags}")
        elif not result["sample"]:
            lines.append("nor with everything recomputed, one sequence a device at a time, and all arrays split")
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
    goal = (
        f"for samples of {result['num_steps']:,} steps"
        if result["sample"]
        else f"{result['days']:.1f} days for {config['training']['num_steps']:,} steps"
    )
    lines += [f"at best {result['tokens_per_second']:,.0f} tokens/s, {result['utilization']:.0%} of peak, {goal}"]
    return "\n".join(lines)


def check_topology(topology: str) -> None:
    """Raises ValueError, which says what there is, where a topology names no slice: libtpu's own messages do not."""
    generation, _, shape = topology.partition(":")
    if generation not in SLICES:
        known = ", ".join(SLICES)
        raise ValueError(
            f"--topology={topology}: no such TPU; known are {known}, with chips along each axis: v5e:4x4, v5p:2x2x2"
        )
    num_axes, most, examples = SLICES[generation]
    sizes = [int(size) if size.isdecimal() else 0 for size in shape.split("x")]
    is_one_chip = num_axes == 2 and sizes == [1, 1]
    is_even = not any(size % 2 for size in sizes[:2])
    if len(sizes) != num_axes or not 0 < math.prod(sizes) <= most or not (is_even or is_one_chip):
        raise ValueError(
            f"--topology={topology}: a {generation} slice has chips along {num_axes} axes, even along the first two, "
            f"{most} in all at most: {generation}:{examples}"
        )


def make_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Devices to compile for, which are not here.

    Raises:
        ValueError: where libtpu is missing or rejects the topology.
    """
    hosts.compile_for_others()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # A program for absent devices cannot be read back.
    options: dict[str, Any] = {}
    if topology.startswith("v4:"):
        # Both cores of a chip are one device, as they are when it runs; on v5p that is the default.
        options["chip_config_name"] = "megacore"
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # libtpu expects four.
    try:
        # It complains of missing what only a TPU host has.
        with hosts.silenced():
            slices = topologies.get_topology_desc(topology, "tpu", num_slices=num_slices, **options)
    except jax.errors.JaxRuntimeError as error:
        if "libtpu" in str(error) or "No jax plugin" in str(error):
            raise ValueError("plan needs libtpu: pip install 'sedd_jax[tpu-plan]'") from error
        raise ValueError(f"--topology={topology}: {str(error).partition(': ')[2] or error}") from error
    return list(slices.devices)


def remedies(config: configs.Config, slice_devices: int, num_slices: int) -> Iterator[dict[str, Any]]:
    """Fields of a training step to change, the cheapest in time first."""
    fields: dict[str, Any] = {}
    if config.network.remat != "blocks":
        fields["network.remat"] = "blocks"
        yield dict(fields)
    training, split = config.training, config.mesh.fsdp * config.mesh.tensor
    # The model is split within a slice, into parts that divide its arrays' sizes.
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


def _compile(
    config: configs.Config,
    vocab_size: int,
    devices: list[jax.Device],
    accelerator: accelerators.Accelerator,
    sample: bool,
) -> dict[str, Any]:
    run = runs.unsaved(config, vocab_size)
    mesh = sharding.make_mesh(config.mesh, devices)
    known: dict[str, Any] = {"mesh": dict(mesh.shape), "hbm_gib": accelerator.hbm_bytes / accelerators.GIB}
    if sample:
        inputs, lowered = _lower_sampling_step(run, mesh)
    else:
        train.check_batch(config, mesh)
        inputs, lowered = train.lower_step(run, mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return known | {"fits": False, "why": _one_line(str(error))}
    used: Any = compiled.memory_analysis()
    with jax.set_mesh(mesh):
        memory = _by_kind(inputs, mesh)
    memory["activations" if sample else "gradients, activations"] = (
        used.peak_memory_in_bytes - used.argument_size_in_bytes
    ) / accelerators.GIB
    memory["program"] = used.generated_code_size_in_bytes / accelerators.GIB
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    found = collectives.collectives(compiled.as_text() or "", num_slices)
    sent: dict[str, Any] = {}
    for one in found:
        name = f"{one.kind} between slices" if one.between_slices else one.kind
        of = sent.setdefault(name, {"number": 0, "bytes_sent": 0.0})
        of["number"] += one.times
        of["bytes_sent"] += one.bytes_sent
    known |= {"fits": True, "memory_gib": memory, "collectives": sent}
    return known | _floors(run, accelerator, mesh, memory, found, sample)


def _lower_sampling_step(run: runs.Run, mesh: jax.sharding.Mesh) -> tuple[networks.Params, jax.stages.Lowered]:
    settings = run.config.sampling
    rules = generate.rules_of(run, settings)
    programs: Any = trajectories.make_programs(run.network, rules)
    params = jax.eval_shape(lambda: networks.init(jax.random.key(0), run.network))
    given = steps.nothing_given((settings.num_samples, run.config.data.length))
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        slots = jax.eval_shape(programs.begin_fn, key, key, generate.together(given, settings.num_steps))
        inputs = sharding.shapes_on(mesh, params), None
        return params, programs.advance_fn.lower(inputs, key, slots, 0, rules.repeats)


def _by_kind(inputs: Any, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """GiB a device of the arrays that a step starts with."""

    def size(tree: Any) -> float:
        shapes = jax.tree.map(
            lambda leaf, spread: math.prod(spread.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
            tree,
            sharding.tree_shardings(mesh, tree),
        )
        return sum(jax.tree.leaves(shapes)) / accelerators.GIB

    if not hasattr(inputs, "opt_state"):
        return {"parameters": size(inputs)}
    return {
        "parameters": size(inputs.params),
        "moving average": size(inputs.ema_params),
        "optimizer": size(inputs.opt_state),
    }


def _floors(
    run: runs.Run,
    accelerator: accelerators.Accelerator,
    mesh: jax.sharding.Mesh,
    memory: dict[str, float],
    found: list[collectives.Collective],
    sample: bool,
) -> dict[str, Any]:
    """Seconds of a step that arithmetic, memory and networks need at their peaks, and what follows from them."""
    config, network, length = run.config, run.network, run.config.data.length
    sequences = config.sampling.num_samples if sample else config.training.batch_size
    batch_devices = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    # A batch that the devices do not divide is whole on all of them.
    parts = mesh.shape["tensor"] * (1 if sequences % batch_devices else batch_devices)
    # A training step is worth three evaluations.
    share = generate.per_step(run, config.sampling) / 3 if sample else 1
    flops = sequences * length * network.flops_per_token(length) * share / parts
    head = sequences * length * 6.0 * network.hidden_size * network.num_states / parts
    # Recomputed blocks are another forward pass, without the head.
    work = flops + (flops - head) / 3 if network.remat == "blocks" and not sample else flops
    sent = {between: sum(one.bytes_sent for one in found if one.between_slices == between) for between in (False, True)}
    seconds = {
        "arithmetic": work / accelerator.peak_flops,
        # What a training step holds is written once and read once at least; a sampling step may only read it.
        "memory": (1 if sample else 2) * sum(memory.values()) * accelerators.GIB / accelerator.hbm_bandwidth,
        "interconnect": sent[False] / accelerator.ici_bandwidth,
    }
    if sent[True]:
        # Unknown for v4.
        seconds["between slices"] = sent[True] / accelerator.dcn_bandwidth if accelerator.dcn_bandwidth else None
    step = max(one for one in seconds.values() if one is not None)
    num_steps = generate.num_steps_of(run, config.sampling, None) if sample else 1
    known = {
        "seconds": seconds,
        "flops_per_device": flops,
        "tokens_per_second": sequences * length / (step * num_steps),
        "utilization": flops / accelerator.peak_flops / step,
    }
    return known | {"num_steps": num_steps} if sample else known | {"days": step * config.training.num_steps / 86_400}


def _one_line(message: str) -> str:
    """The sentence of a compiler's message that holds the sizes."""
    sizes = re.search(r"[^.:]*\([\d.]+[KMG]\) exceeds[^.]*\([\d.]+[KMG]\)", message)
    return " ".join((sizes.group() if sizes else message.partition("\n")[0]).split())
