"""A step compiled for devices that are not here: its memory, collectives, kernels and speed."""

import math
import re
from typing import Any

import jax

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.model import networks, train_state, work
from sedd_jax.performance import benchmark_ours, collectives, costs, gpus
from sedd_jax.reverse import steps
from sedd_jax.runtime import accelerators, sharding
from sedd_jax.sampling import generate, trajectories
from sedd_jax.training import train_steps


def compile_step(config: configs.Config, vocab_size: int, devices: list[jax.Device], sample: bool) -> dict[str, Any]:
    """Compiles a training step (or a sampling step) of a config for devices that need not be here.

    Returns:
        Whether it fits, and all of what `plan` returns about the compiled step.
    """
    accelerator, gpu = accelerators.find(devices[0].device_kind), gpus.find(devices[0].device_kind)
    assert accelerator is not None, devices[0].device_kind
    run = runs.unsaved(config, vocab_size)
    mesh = sharding.make_mesh(config.mesh, devices)
    known: dict[str, Any] = {"mesh": dict(mesh.shape), "hbm_gib": accelerator.hbm_bytes / accelerators.GIB}
    if sample:
        inputs, lowered = _lower_sampling_step(run, mesh)
    else:
        train_steps.check_batch(config, mesh)
        inputs, lowered = train_steps.lower_step(run, mesh)
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
    needed, usable = sum(memory.values()), known["hbm_gib"] * (gpus.usable_share() if gpu else 1)
    if needed > usable:
        return known | {"fits": False, "why": _too_large(needed, usable)}
    text = compiled.as_text() or ""
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    host_devices = len(devices) // len({device.process_index for device in devices}) if gpu else 0
    found = collectives.collectives(text, num_slices, host_devices)
    known |= {"fits": True, "memory_gib": memory, "collectives": _sent(found)}
    known["seconds"] = _floors(run, accelerator, mesh, memory, found, sample)
    share = 0.5 if sample else work.head_share(run.network, run.process)
    known["kernels"] = costs.costs(text, accelerator, gpu, share)
    return known | _speeds(run, accelerator, mesh, known, gpu is not None, sample)


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


def _sent(found: list[collectives.Collective]) -> dict[str, dict[str, float]]:
    """Number of collectives and bytes that a device sends, by kind and network."""
    sent: dict[str, dict[str, float]] = {}
    for one in found:
        where = " between slices" if one.between_slices else " between hosts" if one.num_hosts > 1 else ""
        of = sent.setdefault(one.kind + where, {"number": 0, "bytes_sent": 0.0})
        of["number"] += one.times
        of["bytes_sent"] += one.bytes_sent
    return sent


def _per_device(run: runs.Run, mesh: jax.sharding.Mesh, sample: bool) -> work.Work:
    """Operations of a step on one device."""
    sequences = _sequences(run, sample)
    batch_devices = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    # If the devices do not divide the batch, each of them holds all of it.
    parts = mesh.shape["tensor"] * (1 if sequences % batch_devices else batch_devices)
    per_token = benchmark_ours.flops_per_token(run, "sample" if sample else "train", mesh)
    return work.Work(*(x * sequences * run.config.data.length / parts for x in per_token))


def _sequences(run: runs.Run, sample: bool) -> int:
    return run.config.sampling.num_samples if sample else run.config.training.batch_size


def _floors(
    run: runs.Run,
    accelerator: accelerators.Accelerator,
    mesh: jax.sharding.Mesh,
    memory: dict[str, float],
    found: list[collectives.Collective],
    sample: bool,
) -> dict[str, float | None]:
    """Seconds of a step that arithmetic, memory and networks need at their peak rates; None where no peak is known."""
    seconds: dict[str, float | None] = {
        "arithmetic": sum(_per_device(run, mesh, sample)) / accelerator.peak_flops,
        # A training step reads and writes its memory at least once; a sampling step may only read it.
        "memory": (1 if sample else 2) * sum(memory.values()) * accelerators.GIB / accelerator.hbm_bandwidth,
        "interconnect": sum(one.bytes_within_hosts for one in found if not one.between_slices)
        / accelerator.ici_bandwidth,
    }
    far = {
        "between slices": sum(one.bytes_sent for one in found if one.between_slices),
        "between hosts": sum(one.bytes_between_hosts for one in found),
    }
    # The bandwidth of v4 and L40S is not published.
    rate = accelerator.dcn_bandwidth
    return seconds | {name: sent / rate if rate else None for name, sent in far.items() if sent}


def _speeds(
    run: runs.Run,
    accelerator: accelerators.Accelerator,
    mesh: jax.sharding.Mesh,
    known: dict[str, Any],
    is_gpu: bool,
    sample: bool,
) -> dict[str, Any]:
    """Tokens/s, utilization and days: at best (of the slowest floor), and estimated (of the kernels' sum)."""
    config, flops = run.config, _per_device(run, mesh, sample).needed
    num_steps = generate.num_steps_of(run, config.sampling, None) if sample else 1

    def speed(step: float) -> dict[str, float]:
        tokens = _sequences(run, sample) * config.data.length
        speeds = {
            "tokens_per_second": tokens / (step * num_steps),
            "utilization": flops / accelerator.peak_flops / step,
        }
        return speeds if sample else speeds | {"days": step * config.training.num_steps / 86_400}

    floors = {name: of for name, of in known["seconds"].items() if of is not None}
    networks_alone = [of for name, of in floors.items() if name not in ("arithmetic", "memory")]
    in_kernels = known["kernels"]["seconds"]
    # TPUs overlap collectives with kernels. GPUs may; what they overlap is not known.
    estimate = max(in_kernels + (sum(networks_alone) if is_gpu else 0.0), *floors.values())
    return {
        "flops_per_device": flops,
        "estimate": {"seconds": estimate, "basis": costs.basis(accelerator, is_gpu)} | speed(estimate),
        **speed(max(floors.values())),
        **({"num_steps": num_steps} if sample else {}),
    }


def _too_large(needed: float, usable: float) -> str:
    return (
        f"{needed:.2f} GiB are needed, and JAX takes {usable:.2f} for arrays "
        f"(XLA_PYTHON_CLIENT_MEM_FRACTION={gpus.usable_share():g} of the memory)"
    )


def _one_line(message: str) -> str:
    """The sentence of a compiler's message that states the sizes."""
    sizes = re.search(r"[^.:]*\([\d.]+[KMG]\) exceeds[^.]*\([\d.]+[KMG]\)", message)
    return " ".join((sizes.group() if sizes else message.partition("\n")[0]).split())
