"""What this machine has, what a config gets on it, whether its numbers are right, and what to change.

Whatever a user's machine lacks is a line of the report, never a traceback.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.data import tokenizers
from sedd_jax.model import attentions, networks, train_state
from sedd_jax.performance import compiled_steps, inventory, self_test
from sedd_jax.runtime import accelerators, errors, hosts, sharding
from sedd_jax.training import train_steps

Lines = dict[str, str]
_PRODUCTS = {
    "bfloat16": "factors in bfloat16, sums in float32",
    "float32": "exact, where JAX's default would round on GPUs and TPUs",
    "tensorfloat32": "rounded to TF32 on NVIDIA GPUs, float32 elsewhere",
}
_FASTEST = {"gpu": "cudnn", "tpu": "splash"}


def examine(config: configs.Config, *, vocab_size: int | None = None) -> dict[str, Any]:
    """Examines this machine for a config.

    Args:
        config: a validated config.
        vocab_size: tokens without the mask; the tokenizer's if None.

    Returns:
        `machine`, `packages`, `devices` and `config`, each a dict of lines; `self_test` and `rates`, lists of what
        `self_test.checks` and `self_test.rates` return; `problems`, what to change; and `trains`, whether training can
        work here.
    """
    versions, gpus = inventory.packages(), inventory.nvidia()
    started = inventory.devices()
    place, trouble = inventory.cache(jax.config.jax_compilation_cache_dir)  # pyrefly: ignore[missing-attribute]
    problems = [*inventory.problems(versions, gpus, started), *([trouble] if trouble else [])]
    result: dict[str, Any] = {
        "machine": inventory.machine(),
        "packages": versions | inventory.cuda_libraries(),
        "devices": _devices(started.found, gpus),
        "config": {},
        "self_test": [],
        "rates": [],
    }
    if started.found:
        problems += _examine_config(result, config, vocab_size)
    result["config"]["compiled programs"] = place
    result["problems"] = [problem._asdict() for problem in sorted(problems, key=lambda problem: not problem.is_fatal)]
    result["trains"] = not any(problem.is_fatal for problem in problems)
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = []
    for title, section in (
        ("this machine", "machine"),
        ("packages", "packages"),
        ("devices", "devices"),
        ("this config gets", "config"),
    ):
        lines += [title, *(f"  {name:<18}{line}" for name, line in result[section].items()), ""]
    lines.append("self-test")
    for check in result["self_test"]:
        lines.append(f"  {'OK' if check['is_right'] else 'WRONG':<7}{check['name']}: {check['found']}")
    for rate in result["rates"]:
        unit, peak = rate["unit"], rate["peak"]
        what = " in bfloat16" if unit == "FLOP" else ""
        beside = f"the peak{what} is {peak / 1e9:,.0f}" if peak else "no figure for this device"
        lines.append(f"  {'':<7}{rate['name']}: {rate['per_second'] / 1e9:,.1f} G{unit}/s, {beside}")
    if not (result["self_test"] or result["rates"]):
        lines.append("  not run, since JAX has no devices for this config")
    lines += ["", "what to change"]
    lines += [f"  {'FAILS' if problem['is_fatal'] else 'note':<7}{problem['text']}" for problem in result["problems"]]
    if not result["problems"]:
        lines.append("  nothing")
    return "\n".join(lines)


def _devices(found: list[jax.Device], gpus: inventory.Nvidia) -> Lines:
    lines = {}
    for device in found[:1]:
        known = accelerators.find(device.device_kind)
        memory = _memory_bytes(device, len(found))
        lines |= {
            "JAX's devices": f"{len(found)} x {device.device_kind} ({device.platform})",
            "memory of each": f"{memory / inventory.GIB:.1f} GiB" if memory else "not known",
            "peak of each": f"{known.peak_flops / 1e12:,.0f} TFLOP/s in bfloat16, {known.hbm_bandwidth / 1e9:,.0f} GB/s"
            if known
            else "no figure for this device",
        }
    if gpus.gpus:
        lines["nvidia-smi"] = f"{len(gpus.gpus)} x {gpus.gpus[0]}, driver {gpus.driver}"
    return lines or {"JAX's devices": "none"}


def _memory_bytes(device: jax.Device, num_devices: int) -> int:
    """Memory that a program may use of a device; 0 if it is not known."""
    if device.platform == "cpu":
        return hosts.memory_bytes() // num_devices
    known = accelerators.find(device.device_kind)
    # Not every device counts its memory.
    return (device.memory_stats() or {}).get("bytes_limit") or (known.hbm_bytes if known else 0)


def _examine_config(result: dict[str, Any], config: configs.Config, vocab_size: int | None) -> list[inventory.Problem]:
    """Fills in what a config gets and the self-test; returns what to change."""
    try:
        size = tokenizers.vocab_size_of(config.data.tokenizer) if vocab_size is None else vocab_size
        mesh = sharding.make_mesh(config.mesh)
        train_steps.check_batch(config, mesh)
    except errors.UserError as error:
        return [inventory.Problem(True, f"{error.worded(lambda field: f'--{field}')}.")]
    run = runs.unsaved(config, size)
    with jax.set_mesh(mesh):
        chosen = attentions.resolve(run.network.attention, config.data.length, run.network.array_dtype)
        result["config"] = {
            "attention": f"{chosen}: {_why_attention(config, chosen)}",
            "products": f"{run.network.dtype}: {_PRODUCTS[run.network.dtype]}",
            "loop over layers": _layer_loop(run),
        }
        problems = list(_slow(config, chosen))
    result["config"]["memory"], too_large = _memory(run, mesh)
    problems += too_large
    checks = self_test.checks(run, mesh)
    result["self_test"] = [check._asdict() for check in checks]
    wrong = [check for check in checks if not check.is_right]
    said = [f"{check.name}: {check.found}: {check.remedy}" if check.remedy else check.found for check in wrong]
    problems += [inventory.Problem(True, f"{text}.") for text in said]
    if not wrong:
        try:
            result["rates"] = [rate._asdict() for rate in self_test.rates(config)]
        except jax.errors.JaxRuntimeError as error:
            why = f"a large array or product fails ({inventory.first_line(error)})"
            problems.append(inventory.Problem(True, f"{why}: end other programs that use the device's memory."))
    return problems


def _why_attention(config: configs.Config, chosen: str) -> str:
    if config.network.attention != "auto":
        return "config.network.attention asks for it"
    platform = sharding.platform()
    if chosen != "plain":
        return f"auto takes the fastest on a {platform.upper()} in bfloat16"
    if platform not in _FASTEST:
        return f"auto has no other on a {platform.upper()}"
    if config.network.array_dtype != jnp.bfloat16:
        return f"auto takes {_FASTEST[platform]} in bfloat16 only"
    return f"auto takes {_FASTEST[platform]} only for lengths divisible by {attentions.TPU_LANES}"


def _layer_loop(run: runs.Run) -> str:
    """Whether the loop over layers is rolled, and why."""
    config, network = run.config, run.network
    num_tokens = config.training.batch_size // config.training.num_micro_batches * config.data.length
    platform = sharding.platform()
    if network.layer_loop != "auto":
        why = "config.network.layer_loop asks for it"
    elif platform == "cpu":
        why = "auto unrolls on a CPU only with config.network.remat=none"
    elif platform == "tpu":
        why = "auto never unrolls on a TPU"
    elif network.remat == "blocks":
        why = "auto never unrolls with config.network.remat=blocks"
    elif accelerators.find(sharding.device_kind()) is None:
        why = "auto does not know this GPU's memory"
    else:
        why = "auto unrolls where activations take less than half of the memory"
    return f"{'unrolled' if networks.is_unrolled(network, num_tokens) else 'rolled'}: {why}"


def _slow(config: configs.Config, chosen: str) -> Iterator[inventory.Problem]:
    """Settings that cost speed on this platform."""
    platform, is_narrow = sharding.platform(), config.network.array_dtype == jnp.bfloat16
    if platform == "cpu" and is_narrow:
        text = "bfloat16 is less exact than float32 and rarely faster on a CPU: set --config.network.dtype=float32."
        yield inventory.Problem(False, text)
    if platform in _FASTEST and chosen == "plain":
        remedy = "--config.network.dtype=bfloat16"
        if is_narrow:
            remedy = "--config.network.attention=auto"
            if config.network.attention == "auto":
                remedy = f"--config.data.length to a multiple of {attentions.TPU_LANES}"
        yield inventory.Problem(False, f"plain attention is slower than {_FASTEST[platform]}: set {remedy}.")


def _memory(run: runs.Run, mesh: jax.sharding.Mesh) -> tuple[str, list[inventory.Problem]]:
    """What a device holds of the model while training, and whether that is too much."""
    optimizer = train_steps.make_optimizer(run.config)
    shapes = jax.eval_shape(lambda: train_state.create(jax.random.key(0), run.network, optimizer))
    try:
        parts = compiled_steps.gib_by_kind(shapes, mesh)
    except ValueError as error:
        # JAX's error for an array that its axes do not divide.
        why = f"the mesh does not divide the network ({inventory.first_line(error)})"
        remedy = "set --config.mesh.fsdp and --config.mesh.tensor to divisors of its sizes"
        return "not known", [inventory.Problem(True, f"{why}: {remedy}.")]
    # Clipping by the global norm needs all gradients at once.
    parts["gradients"] = parts["parameters"]
    total = sum(parts.values())
    limit = _memory_bytes(mesh.devices.flat[0], mesh.size) / inventory.GIB
    text = f"{total:.2f} GiB a device before activations"
    text += f", of {limit:.1f}" if limit else ""
    text += f" ({', '.join(f'{name} {size:.2f}' for name, size in parts.items())})"
    if not limit or total <= limit:
        return text, []
    remedy = "set --config.mesh.fsdp to more devices" if mesh.size > 1 else "use more devices, or a smaller network"
    return text, [inventory.Problem(True, f"the model takes {total:.2f} GiB of {limit:.2f} a device: {remedy}.")]
