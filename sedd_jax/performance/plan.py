"""Whether a config fits a TPU slice, and the least time of a step there, on a machine without TPUs.

The real training step (or sampling step) is compiled for the slice. Memory and collectives come from the compiled
program. The time is a lower bound from the peak rates of a chip.
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
from sedd_jax.model import networks, train_state
from sedd_jax.performance import benchmark_ours, collectives
from sedd_jax.runtime import accelerators, errors, hosts, sharding
from sedd_jax.sampling import generate, trajectories
from sedd_jax.training import train

# Slices that libtpu knows and Google offers: number of axes, most chips, and shapes for messages.
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
    """Compiles a config's training step for a TPU slice. If it does not fit, finds changes that make it fit.

    Args:
        config: a validated config.
        topology: generation and chips along each axis, such as "v5e:4x4".
        num_slices: number of slices of that shape, connected by the data centre's network.
        vocab_size: tokens without the mask; the tokenizer's if None.
        sample: compile a sampling step of sampling.num_samples sequences instead of the training step.

    Returns:
        Whether it fits; GiB per device by kind; collectives by kind with the bytes a device sends in a step; seconds
        that arithmetic, memory and networks need at their peak rates. From the slowest of these: tokens/s (of finished
        samples for a sampling step), utilization, and days of training.

    Raises:
        errors.UserError: if the slice does not exist, or its devices do not divide the batch.
    """
    vocab_size = tokenizers.vocab_size_of(config.data.tokenizer) if vocab_size is None else vocab_size
    for name, value in (("num_slices", num_slices), ("vocab_size", vocab_size)):
        if value < 1:
            raise errors.UserError("must be at least 1", field=name, value=value)
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
    goal = (
        f"for samples of {result['num_steps']:,} steps"
        if result["sample"]
        else f"{result['days']:.1f} days for {config['training']['num_steps']:,} steps"
    )
    lines += [f"at best {result['tokens_per_second']:,.0f} tokens/s, {result['utilization']:.0%} of peak, {goal}"]
    return "\n".join(lines)


def check_topology(topology: str) -> None:
    """Raises errors.UserError, which lists the known slices, if a topology is none. Messages of libtpu do not."""
    refuse = lambda problem, remedy: errors.UserError(problem, field="topology", value=topology, remedy=remedy)
    generation, _, shape = topology.partition(":")
    if generation not in SLICES:
        known = ", ".join(SLICES)
        raise refuse("is no such TPU", f"known are {known}, with chips along each axis: v5e:4x4, v5p:2x2x2")
    num_axes, most, examples = SLICES[generation]
    sizes = [int(size) if size.isdecimal() else 0 for size in shape.split("x")]
    is_one_chip = num_axes == 2 and sizes == [1, 1]
    is_even = not any(size % 2 for size in sizes[:2])
    if len(sizes) != num_axes or not 0 < math.prod(sizes) <= most or not (is_even or is_one_chip):
        raise refuse(
            f"is no slice of a {generation}, which has chips along {num_axes} axes, even along the first two, {most} "
            "in all at most",
            f"{generation}:{examples}",
        )


def make_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """Devices of a TPU slice to compile for. They need not exist here.

    Raises:
        errors.UserError: if libtpu is not installed or rejects the topology.
    """
    hosts.compile_for_others()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # JAX cannot load programs for absent devices from it.
    options: dict[str, Any] = {}
    if topology.startswith("v4:"):
        # Both cores of a chip form one device, as they do on real chips. On v5p this is the default.
        options["chip_config_name"] = "megacore"
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # The default is four chips per host.
    try:
        # libtpu warns of everything that only a TPU host has.
        with hosts.silenced():
            slices = topologies.get_topology_desc(topology, "tpu", num_slices=num_slices, **options)
    except jax.errors.JaxRuntimeError as error:
        if "libtpu" in str(error) or "No jax plugin" in str(error):
            raise errors.UserError("plan needs libtpu", remedy="pip install 'sedd_jax[tpu-plan]'") from error
        why = str(error).partition(": ")[2] or str(error)
        raise errors.UserError(f"is refused by libtpu ({why})", field="topology", value=topology) from error
    return list(slices.devices)


def remedies(config: configs.Config, slice_devices: int, num_slices: int) -> Iterator[dict[str, Any]]:
    """Changes of fields that reduce the memory of a training step, the one that costs the least time first."""
    fields: dict[str, Any] = {}
    if config.network.remat != "blocks":
        fields["network.remat"] = "blocks"
        yield dict(fields)
    training, split = config.training, config.mesh.fsdp * config.mesh.tensor
    # FSDP stays within a slice. The number of parts must divide the sizes of the arrays.
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
        memory = gib_by_kind(inputs, mesh)
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


def gib_by_kind(inputs: networks.Params | train_state.TrainState, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """GiB per device of the arrays that a step starts with."""

    def size(tree: Any) -> float:
        shapes = jax.tree.map(
            lambda leaf, spread: math.prod(spread.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
            tree,
            sharding.tree_shardings(mesh, tree),
        )
        return sum(jax.tree.leaves(shapes)) / accelerators.GIB

    if not isinstance(inputs, train_state.TrainState):
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
    """Seconds of a step that arithmetic, memory and networks need at their peak rates, and speeds derived from them."""
    config, length = run.config, run.config.data.length
    sequences = config.sampling.num_samples if sample else config.training.batch_size
    batch_devices = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    # If the devices do not divide the batch, each of them holds all of it.
    parts = mesh.shape["tensor"] * (1 if sequences % batch_devices else batch_devices)
    per_token = benchmark_ours.flops_per_token(run, "sample" if sample else "train", mesh)
    flops, repeated = (x * sequences * length / parts for x in per_token)
    sent = {between: sum(one.bytes_sent for one in found if one.between_slices == between) for between in (False, True)}
    seconds = {
        "arithmetic": (flops + repeated) / accelerator.peak_flops,
        # A training step reads and writes its memory at least once; a sampling step may only read it.
        "memory": (1 if sample else 2) * sum(memory.values()) * accelerators.GIB / accelerator.hbm_bandwidth,
        "interconnect": sent[False] / accelerator.ici_bandwidth,
    }
    if sent[True]:
        # The bandwidth of v4 is not published.
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
    """The sentence of a compiler's message that states the sizes."""
    sizes = re.search(r"[^.:]*\([\d.]+[KMG]\) exceeds[^.]*\([\d.]+[KMG]\)", message)
    return " ".join((sizes.group() if sizes else message.partition("\n")[0]).split())
