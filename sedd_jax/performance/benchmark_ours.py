"""Runs our own steps for `sedd bench`, as a process that `benchmark.Worker` starts.

Reads a job (a line of JSON), compiles and answers with a line of JSON. Then it reads lines with a number of steps, runs
them and answers with their seconds and the peak memory.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.model import attentions, networks, work
from sedd_jax.reverse import steps
from sedd_jax.runtime import accelerators, errors, hosts, sharding
from sedd_jax.sampling import generate, trajectories
from sedd_jax.training import train_steps


def main() -> None:
    channel, sys.stdout = sys.stdout, sys.stderr
    job = json.loads(sys.stdin.readline())
    # Without the cache, seconds to compile are those of a new program.
    jax.config.update("jax_enable_compilation_cache", False)
    config = configs.parse(job["config"])
    run = runs.unsaved(config, job["vocab_size"])
    mesh = sharding.make_mesh(config.mesh)
    train_steps.check_batch(config, mesh)
    with jax.set_mesh(mesh):
        compile_seconds, step = {"train": train_step, "sample": sampling_step}[job["kind"]](run, mesh)
        jax.block_until_ready(step())
        device = mesh.devices.flat[0]
        accelerator = accelerators.find(device.device_kind)
        ready = {
            "compile_seconds": compile_seconds,
            "versions": f"jax {jax.__version__}, Python {sys.version.split()[0]}",
            "attention": attentions.resolve(config.network.attention, config.data.length, run.network.array_dtype),
            "device": device.device_kind,
            "num_devices": mesh.size,
            "peak_flops": None if accelerator is None else accelerator.peak_flops * mesh.size,
            "work": flops_per_token(run, job["kind"], mesh)._asdict(),
        }
        print(json.dumps(ready), file=channel, flush=True)
        for line in sys.stdin:
            started = time.perf_counter()
            results = [step() for _ in range(int(line))]
            jax.block_until_ready(results)
            seconds = time.perf_counter() - started
            print(json.dumps({"seconds": seconds, "peak_bytes": _peak_bytes(device)}), file=channel, flush=True)


def flops_per_token(run: runs.Run, kind: str, mesh: jax.sharding.Mesh) -> work.Work:
    """Work of the step on a mesh, whose devices may not be on this machine."""
    config, share = run.config, work.head_share(run.network, run.process)
    if kind == "train":
        with jax.set_mesh(mesh):
            batch = config.training.batch_size // config.training.num_micro_batches // sharding.num_batch_devices()
            return work.of_training(run.network, share, batch, config.data.length)
    # Half of the tokens are noise; the baseline draws one position.
    share = 1 / config.data.length if run.is_autoregressive else 0.5 if run.graph.has_mask else 1.0
    one = work.of_evaluation(run.network, config.data.length, share)
    return work.Work(*(generate.per_step(run, config.sampling) * x for x in one))


def train_step(run: runs.Run, mesh: jax.sharding.Mesh) -> tuple[float, Callable[[], Any]]:
    """Seconds to compile, and a function that runs one optimizer step on a batch of random tokens."""
    shape = (train_steps.num_texts(run.config.training), run.config.data.length)
    x0 = np.random.default_rng(0).integers(run.tokenizer.vocab_size, size=shape, dtype=np.int32)
    # Compiles before it makes the state, so that peak memory is the step's.
    compile_seconds, compiled = _compile(lambda: train_steps.lower_step(run, mesh)[1])
    state = train_steps.make_state_fn(run, train_steps.make_optimizer(run.config), mesh)()

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, jax.device_put(x0, sharding.batch_sharding(mesh)))
        return metrics

    return compile_seconds, step


def sampling_step(run: runs.Run, mesh: jax.sharding.Mesh) -> tuple[float, Callable[[], Any]]:
    """Seconds to compile, and a function that runs the sampling step at t = 1/2, with half of the tokens noise."""
    settings = run.config.sampling
    create = lambda: networks.init(jax.random.key(run.config.seed), run.network)
    params = jax.jit(create, out_shardings=sharding.tree_shardings(mesh, jax.eval_shape(create)))()
    shape = (settings.num_samples, run.config.data.length)
    tokens = np.random.default_rng(0).integers(run.tokenizer.vocab_size, size=shape, dtype=np.int32)
    limit = run.graph.sample_limit(jax.random.key(0), shape)
    xt = jnp.where(jnp.arange(shape[1])[None] % 2 == 0, limit, tokens)
    rules = generate.rules_of(run, settings)
    programs: Any = trajectories.make_programs(run.network, rules)
    sequences = generate.together(steps.nothing_given(shape), settings.num_steps)
    slots = programs.begin_fn(jax.random.key(0), jax.random.key(1), sequences)
    half = settings.num_steps // 2 * rules.repeats
    slots = slots._replace(batch=slots.batch._replace(xt=xt, iteration=jnp.full(shape[0], half)))
    inputs = ((params, None), jax.random.key(0), slots, half, half + rules.repeats)
    compile_seconds, compiled = _compile(lambda: programs.advance_fn.lower(*inputs))
    return compile_seconds, lambda: compiled(*inputs)


def _compile(lower: Callable[[], jax.stages.Lowered]) -> tuple[float, jax.stages.Compiled]:
    """Seconds to trace and compile a program, and the program."""
    started = time.perf_counter()
    compiled = lower().compile()
    return time.perf_counter() - started, compiled


def _peak_bytes(device: jax.Device) -> int:
    """Peak memory of the device, or of this process if the device is a CPU."""
    if device.platform == "cpu":
        return hosts.peak_memory_bytes()
    return device.memory_stats()["peak_bytes_in_use"]


if __name__ == "__main__":
    try:
        main()
    except (errors.UserError, jax.errors.JaxRuntimeError) as error:
        sys.exit(" ".join(str(error).split()))
