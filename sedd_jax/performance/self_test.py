"""Ten seconds of arithmetic on this machine's devices: are the numbers right, and how fast do they come.

Numbers decide whether a check passes, times never do.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.diffusion import absorbing, losses
from sedd_jax.model import attentions, layers, networks, objectives
from sedd_jax.performance import inventory, numpy_network
from sedd_jax.runtime import accelerators, errors, sharding
from sedd_jax.training import train_steps

# What is allowed of a dtype: the largest difference, relative to the largest entry. A product in float32 that a device
# rounds to TF32 or bfloat16 exceeds the first.
TOLERANCES = {"float32": 1e-4, "tensorfloat32": 1e-2, "bfloat16": 0.05}
NUM_TOKENS = 11
TINY = networks.NetworkConfig(
    num_states=NUM_TOKENS + 1,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    cond_dim=16,
    dropout=0.0,
    dtype="float32",
    attention="plain",
)
LONGEST = 4096  # Tokens of a sequence that attention is checked with.
ADD_BYTES = {"cpu": 1 << 27, "gpu": 1 << 29, "tpu": 1 << 29}  # More than fits in caches.
PRODUCT_SIZE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
SECONDS_PER_RATE = 0.3
# On a CPU nearly all of the time is the compiler's, which takes half of it without optimising.
COMPILER_OPTIONS: dict[str, Any] = {"cpu": {"xla_backend_optimization_level": 0}}


class Check(NamedTuple):
    """One check of numbers.

    Attributes:
        name: what was compared with what.
        is_right: whether it passed.
        found: the numbers, or why there are none.
        remedy: what to do where it did not pass; "" where `found` says it.
    """

    name: str
    is_right: bool
    found: str
    remedy: str = ""


class Rate(NamedTuple):
    """A speed that was reached.

    Attributes:
        name: what was timed.
        unit: what was counted: B (bytes) or FLOP.
        per_second: how many in a second.
        peak: the device's figure; None if there is none.
    """

    name: str
    unit: str
    per_second: float
    peak: float | None


class Tiny(NamedTuple):
    """A step of the network `TINY`.

    Attributes:
        params: parameters of which none is 0.
        direction: a direction in their space.
        inputs: sequences of which half of the tokens are masks.
    """

    params: networks.Params
    direction: networks.Params
    inputs: losses.Noised


def make_tiny() -> Tiny:
    """The same numbers in every call."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: networks.init(jax.random.key(0), TINY))
    normal = functools.partial(_normal, rng, 0.3)
    x0 = rng.integers(NUM_TOKENS, size=(4, 16), dtype=np.int32)
    return Tiny(
        params=jax.tree.map(normal, shapes),
        direction=jax.tree.map(normal, shapes),
        inputs=losses.Noised(
            xt=jnp.where(rng.random(x0.shape) < 0.5, NUM_TOKENS, x0),
            x0=jnp.asarray(x0),
            sigma=jnp.array([0.05, 0.4, 1.0, 4.0]),
            weights=jnp.array([0.2, 0.3, 0.4, 0.5]),
        ),
    )


def _normal(rng: np.random.Generator, scale: float, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    return (scale * rng.normal(size=leaf.shape)).astype(np.float32)


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    return lowered.compile(COMPILER_OPTIONS.get(sharding.platform()))


def checks(run: runs.Run, mesh: jax.sharding.Mesh) -> list[Check]:
    """Numbers of the devices: a tiny network beside NumPy, this run's attention, and an optimizer step."""
    network = run.network
    chosen = attentions.resolve(network.attention, run.config.data.length, network.array_dtype)
    other = f"set --config.network.attention=plain{' or JAX_PLATFORMS=cpu' * (chosen == 'plain')}"
    update = "install JAX and the driver again, or set JAX_PLATFORMS=cpu"
    numbers = _tried("loss of a tiny network beside NumPy's", update, beside_numpy)
    attention = _tried(f"attention ({chosen}) beside plain", other, lambda: beside_plain(run, chosen))
    if not all(check.is_right for check in attention):
        return [*numbers, *attention]  # A step with this attention would fail for the same reason.
    step = _tried("an optimizer step of a tiny network", update, lambda: optimizer_step(run, mesh))
    return [*numbers, *attention, *step]


def _tried(name: str, remedy: str, check: Callable[[], list[Check]]) -> list[Check]:
    """What check() returns, with the remedy where it is wrong; one failed check if it raises."""
    try:
        found = check()
    except errors.UserError as error:
        return [Check(name, False, error.worded(lambda field: f"--{field}"))]
    except Exception as error:
        # A driver, a compiler or a kernel may raise anything, and the report goes on.
        found = [Check(name, False, f"{type(error).__name__}: {inventory.first_line(error)}")]
    return [one if one.is_right else one._replace(remedy=remedy) for one in found]


def beside_numpy() -> list[Check]:
    """Loss of the tiny network, and its derivative along a direction, which NumPy has from central differences."""
    params, direction, inputs = make_tiny()
    graph = absorbing.Absorbing(vocab_size=NUM_TOKENS, mask_id=NUM_TOKENS)
    loss_fn = lambda params: objectives.noised_bounds(networks.Model(TINY, params), graph, inputs).score_entropy
    on_device = jax.device_put(params)
    loss, gradient = _compile(jax.jit(jax.value_and_grad(loss_fn)).lower(on_device))(on_device)
    along = jax.tree.map(lambda a, b: np.vdot(np.float64(a), b), gradient, direction)

    moved = lambda h: jax.tree.map(lambda p, d: p.astype(np.float64) + h * d, params, direction)
    at = lambda h: numpy_network.loss(TINY, moved(h), inputs)
    h = 1e-5
    return [
        _compared("loss of a tiny network beside NumPy's", loss, at(0.0)),
        _compared("its derivative beside NumPy's", sum(jax.tree.leaves(along)), (at(h) - at(-h)) / (2 * h)),
    ]


def beside_plain(run: runs.Run, chosen: str) -> list[Check]:
    """Value and gradient of an attention in the run's dtype, beside plain attention in float32, on one sequence.

    Raises:
        errors.UserError: where it does not support this platform, dtype or length.
    """
    network, length = run.network, run.config.data.length
    rules = {"causal": network.causal, "precision": layers.precision(network.dtype)}
    ours = functools.partial(attentions.attend, implementation=chosen, **rules)
    plain = functools.partial(attentions.attend, implementation="plain", causal=network.causal)
    whole = jax.ShapeDtypeStruct((1, length, 3 * network.hidden_size), network.array_dtype)
    jax.eval_shape(functools.partial(ours, num_heads=network.num_heads), whole)
    # A long sequence is cut, to a length that 128 divides only if it divides the whole. Then it has fewer heads.
    length = length if length <= LONGEST else LONGEST + length % attentions.TPU_LANES
    num_heads = min(network.num_heads, max(1, LONGEST // length))
    normal = np.random.default_rng(0).normal(size=(4, 1, length, num_heads * network.head_size))
    weights, *parts = jnp.asarray(normal, jnp.float32)
    qkv = jnp.concatenate(parts, axis=-1)

    def value_and_gradient(attend: Callable[..., Any], qkv: jax.Array) -> Any:
        def combine(qkv: jax.Array) -> Any:
            out = attend(qkv, num_heads).astype(jnp.float32)
            return (out * weights).sum(), out

        gradient, out = jax.jit(jax.grad(combine, has_aux=True))(qkv)
        return out, gradient

    found = value_and_gradient(ours, qkv.astype(network.array_dtype))
    expected = value_and_gradient(plain, qkv)
    name = f"attention ({chosen}, {network.dtype}) beside plain in float32"
    compared = functools.partial(_compared, dtype=network.dtype)
    return [compared(name, found[0], expected[0]), compared(f"gradient of {name}", found[1], expected[1])]


def _compared(name: str, ours: Any, expected: Any, dtype: str = "float32") -> Check:
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    deviation = float(np.abs(ours - expected).max() / np.abs(expected).max())
    allowed = TOLERANCES[dtype]
    # NaN is not at most anything.
    return Check(name, deviation <= allowed, f"differs by {deviation:.1e}, at most {allowed:.0e} is right")


def optimizer_step(run: runs.Run, mesh: jax.sharding.Mesh) -> list[Check]:
    """One training step on all devices, of the run's config with a network and sequences that are tiny."""
    run = runs.unsaved(shrunk(run.config, mesh), NUM_TOKENS)
    shapes, lowered = train_steps.lower_step(run, mesh)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    # No parameter is 0, so that every part of the network has a gradient.
    params = jax.tree.map(functools.partial(_normal, np.random.default_rng(0), 0.1), shapes.params)
    state = jax.device_put(zeros.replace(params=params, ema_params=params), sharding.tree_shardings(mesh, shapes))
    size = (train_steps.num_texts(run.config.training), run.config.data.length)
    x0 = np.random.default_rng(0).integers(NUM_TOKENS, size=size, dtype=np.int32)
    with jax.set_mesh(mesh):
        step = _compile(lowered)
    _, metrics = step(state, jax.device_put(x0, sharding.batch_sharding(mesh)))
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    loss, norm = metrics["train/loss"], metrics["train/grad_norm"]
    name = f"an optimizer step of a tiny network on {mesh.size} device{'s'[: mesh.size > 1]}"
    is_right = math.isfinite(loss) and math.isfinite(norm) and norm > 0
    return [Check(name, is_right, f"loss {loss:.3g} nats per token, norm of the gradient {norm:.3g}")]


def shrunk(config: configs.Config, mesh: jax.sharding.Mesh) -> configs.Config:
    """The config with two small layers and short sequences, which get the same attention and fill the same mesh."""
    network, sizes = config.network, mesh.shape
    hidden_size = math.lcm(2 * network.head_size, sizes["fsdp"], sizes["tensor"])
    length = attentions.TPU_LANES if config.data.length % attentions.TPU_LANES == 0 else 16
    batch_size = 2 * math.prod(sizes[axis] for axis in sharding.BATCH_AXES)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, length=length),
        network=dataclasses.replace(
            network,
            hidden_size=hidden_size,
            num_heads=hidden_size // network.head_size,
            num_layers=2,
            cond_dim=math.lcm(16, sizes["fsdp"]),
        ),
        training=dataclasses.replace(config.training, batch_size=batch_size, num_micro_batches=1),
    )


def rates(config: configs.Config) -> list[Rate]:
    """Bytes per second of a large sum, and operations per second of a large product in the config's dtype."""
    platform, known = sharding.platform(), accelerators.find(sharding.device_kind())
    dtype, precision = config.network.array_dtype, layers.precision(config.network.dtype)
    x = jnp.ones(ADD_BYTES[platform] // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    size = PRODUCT_SIZE[platform]
    factor = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.dot(x, factor, precision=precision) / size)
    return [
        Rate(
            "bandwidth of memory, read and written",
            "B",
            2 * ADD_BYTES[platform] / _seconds(add, x),
            known.hbm_bandwidth if known else None,
        ),
        Rate(
            f"products of {size} x {size} in {config.network.dtype}",
            "FLOP",
            2 * size**3 / _seconds(product, factor),
            known.peak_flops if known else None,
        ),
    ]


def _seconds(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """The least seconds per call of x = fn(x) in three rounds, the first of which compiles."""
    best, calls = math.inf, 1
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(calls):
            x = fn(x)
        jax.block_until_ready(x)
        best = min(best, (time.perf_counter() - started) / calls)
        calls = max(1, min(100, int(SECONDS_PER_RATE / best)))
    return best
