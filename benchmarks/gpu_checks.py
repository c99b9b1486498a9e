"""Compares what this machine's accelerator computes with a CPU's float32: `python benchmarks/gpu_checks.py`.

Each line is a part of the program, its largest deviation relative to the largest entry, and what is allowed. It ends
with status 1 if a deviation is too large.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax.diffusion import forward, graphs, noise_schedules, time_laws
from sedd_jax.model import attentions, networks, objectives
from sedd_jax.runtime import sharding

NUM_TOKENS = 5000
SIZES = {"hidden_size": 256, "num_layers": 2, "num_heads": 4, "dropout": 0.0}
# Relative to the largest entry of each array.
FLOAT32, BFLOAT16 = 1e-5, 0.05


def on(device: jax.Device, fn: Callable[..., Any], *arguments: Any) -> Any:
    """What fn computes on a device, as NumPy arrays."""
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), [device])):
        return jax.tree.map(np.asarray, jax.jit(fn)(*jax.device_put(arguments, device)))


def deviation(ours: Any, expected: Any) -> float:
    """The largest difference of two trees, each array's relative to its largest entry."""
    far = jax.tree.map(lambda a, b: np.abs(np.float64(a) - b).max() / max(np.abs(b).max(), 1e-12), ours, expected)
    return max(jax.tree.leaves(far))


def loss_and_gradient(config: networks.NetworkConfig, graph: graphs.Graph) -> Callable[..., Any]:
    """Training loss and its gradient in every parameter, in float32."""
    process = forward.Process(graph, noise_schedules.SCHEDULES["loglinear"](eps=1e-3))

    def loss(params: networks.Params, x0: jax.Array) -> jax.Array:
        times = time_laws.Times(jnp.linspace(0.05, 0.95, len(x0)), jnp.ones(len(x0)))
        model = networks.Model(config, params)
        return objectives.mean_bounds(jax.random.key(2), model, process, x0, times).score_entropy

    return jax.value_and_grad(loss)


def attention(implementation: str, qkv: jax.Array, **how: Any) -> Any:
    """Attention and its gradient, in float32."""
    weights = jax.random.normal(jax.random.key(1), (*qkv.shape[:2], qkv.shape[2] // 3))
    loss = lambda qkv: (attentions.attend(qkv, 4, implementation, **how).astype(jnp.float32) * weights).sum()
    return jax.value_and_grad(loss)(qkv)[1].astype(jnp.float32)


def main() -> None:
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    results = []

    def report(name: str, found: float, allowed: float) -> None:
        results.append(found <= allowed)
        print(f"{name:<60}{found:10.1e}  at most {allowed:.0e}{'' if results[-1] else '  WRONG'}", flush=True)

    for name in graphs.GRAPHS:
        graph = graphs.GRAPHS[name].from_tokenizer(NUM_TOKENS, None)
        for normalize in (False, True):
            config = networks.NetworkConfig(
                num_states=graph.num_states,
                scale_by_sigma=graph.scales_by_sigma,
                normalize=normalize,
                dtype="float32",
                **SIZES,
            )
            params = on(cpu, lambda config=config: networks.init(jax.random.key(0), config))
            params = jax.tree.map(lambda x: x + 0.05 * np.random.default_rng(x.size).normal(size=x.shape), params)
            params = jax.tree.map(np.float32, params)
            x0 = np.random.default_rng(0).integers(NUM_TOKENS, size=(8, 256)).astype(np.int32)
            expected = on(cpu, loss_and_gradient(config, graph), params, x0)
            for dtype, loop, allowed in (
                ("float32", "rolled", FLOAT32),
                ("tensorfloat32", "rolled", BFLOAT16),
                ("bfloat16", "rolled", BFLOAT16),
                ("bfloat16", "unrolled", BFLOAT16),
            ):
                changed = dataclasses.replace(config, dtype=dtype, layer_loop=loop)
                found = on(device, loss_and_gradient(changed, graph), params, x0)
                way = f"{name}{', normalised' * normalize}, {dtype}, {loop}"
                report(f"loss: {way}", deviation(found[0], expected[0]), allowed)
                report(f"gradient: {way}", deviation(found[1], expected[1]), allowed)
    qkv = np.float32(np.random.default_rng(1).normal(size=(2, 256, 768)))
    for causal in (False, True):
        for lengths in (None, np.array([256, 77], np.int32)):
            how = {"causal": causal, "lengths": lengths}
            expected = on(cpu, functools.partial(attention, "plain", **how), qkv)
            way = f"{'causal' if causal else 'bidirectional'}{'' if lengths is None else ', padded'}"
            found = on(device, functools.partial(attention, "plain", **how), qkv)
            report(f"attention: plain, float32, {way}", deviation(found, expected), FLOAT32)
            found = on(device, functools.partial(attention, "auto", **how), jnp.bfloat16(qkv))
            chosen = attentions.choose(device.platform, 256, jnp.bfloat16)
            report(f"attention: {chosen}, bfloat16, {way}", deviation(found, expected), BFLOAT16)
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
