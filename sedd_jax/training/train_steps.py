"""The optimizer step: what it computes, and its compilation for a mesh."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.diffusion import time_laws
from sedd_jax.model import networks, objectives, optimizers, train_state
from sedd_jax.runtime import errors, sharding
from sedd_jax.training import compilation

Metrics = dict[str, Any]
StepFn = Callable[[train_state.TrainState, Int[Array, "B L"]], tuple[train_state.TrainState, Metrics]]


def train_step(
    state: train_state.TrainState,
    x0: Int[Array, "B L"],
    *,
    run: runs.Run,
    optimizer: optax.GradientTransformationExtraArgs,
) -> tuple[train_state.TrainState, Metrics]:
    """One optimizer step on a batch, with gradient accumulation over micro-batches.

    Times are spread over the whole batch. Each micro-batch has its own noise and dropout; gradients are averaged. The
    loss is the mean over sequences of the bound in nats (equation 10), as published. Metrics are per token. With
    `training.paired_noise` x0 holds half as many sequences, and each is noised twice.
    """
    config = run.config.training
    num_micro, copies = config.num_micro_batches, num_copies(config)
    base_key = jax.random.fold_in(jax.random.key(run.config.seed), 1)
    key_times, key_micro = jax.random.split(jax.random.fold_in(base_key, state.step))
    with jax.named_scope("noise"):
        learned = {"moments": state.opt_state[0]} if config.time_law == "learned" else {}
        count = copies * len(x0)
        times = time_laws.sample_times(key_times, count, config.time_law, paired=config.paired_noise, **learned)
        times = jax.tree.map(lambda x: x.reshape(len(x0), copies), times)

    def loss_fn(params: networks.Params, key: Key[Array, ""], x0: Int[Array, "b L"], times: time_laws.Times):
        key_noise, key_dropout = jax.random.split(key)
        model = networks.Model(run.network, params)
        x0, times = jnp.repeat(x0, copies, axis=0), jax.tree.map(jnp.ravel, times)
        found = objectives.mean_bounds(
            key_noise, model, run.process, x0, times, key_dropout, paired=config.paired_noise
        )
        return found.score_entropy, (found.cross_entropy, found.of_sequences * len(x0) / times.weights)

    def micro_batch(total: Any, inputs: Any):
        (loss, (cross_entropy, of_sequences)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *inputs)
        return jax.tree.map(lambda a, b: a + b / num_micro, total, (loss, cross_entropy, grads)), of_sequences

    # Sequence i goes to micro-batch i % num_micro: each has times from the whole interval, and sequences stay on their
    # devices.
    deal = lambda x: jnp.moveaxis(x.reshape(-1, num_micro, *x.shape[1:]), 1, 0)
    zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    x0_parts, times_parts = jax.tree.map(deal, (x0, times))
    parts = jax.random.split(key_micro, num_micro), x0_parts, times_parts
    (loss, cross_entropy, grads), of_sequences = jax.lax.scan(micro_batch, zeros, parts)

    with jax.named_scope("optimizer"):
        by_time = {"times": times_parts.t.ravel(), "losses": of_sequences.ravel()}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **by_time)
        params: Any = optax.apply_updates(state.params, updates)
        ema_params = optimizers.update_ema(state.ema_params, params, state.step + 1, run.config.optimizer.ema_decay)
    metrics = {
        "train/loss": loss / x0.shape[1],
        "train/grad_norm": optax.tree.norm(grads),
        "train/learning_rate": optimizers.learning_rate(run.config.optimizer, state.step, config.num_steps),
    }
    if run.graph.has_cross_entropy and not run.is_autoregressive:
        metrics["train/cross_entropy"] = cross_entropy / x0.shape[1]
    return train_state.TrainState(state.step + 1, params, ema_params, opt_state), metrics


def num_copies(config: configs.TrainingConfig) -> int:
    """How often a step noises each sequence of text."""
    return 2 if config.paired_noise else 1


def num_texts(config: configs.TrainingConfig) -> int:
    """Number of sequences of text in a step. `batch_size` counts their copies."""
    return config.batch_size // num_copies(config)


def make_optimizer(config: configs.Config) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run."""
    return optimizers.make_optimizer(config.optimizer, config.training.num_steps, config.training.time_law)


def make_state_fn(
    run: runs.Run, optimizer: optax.GradientTransformationExtraArgs, mesh: jax.sharding.Mesh
) -> Callable[[], train_state.TrainState]:
    """A function that initialises the state of a run, compiled for the mesh."""

    def create() -> train_state.TrainState:
        return train_state.create(jax.random.key(run.config.seed), run.network, optimizer)

    return jax.jit(create, out_shardings=sharding.tree_shardings(mesh, jax.eval_shape(create)))


def make_step_fn(
    run: runs.Run,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: jax.sharding.Mesh,
    state: train_state.TrainState,
) -> StepFn:
    """`train_step` compiled for the mesh. It donates the state."""
    shardings = sharding.tree_shardings(mesh, state)
    return jax.jit(
        functools.partial(train_step, run=run, optimizer=optimizer),
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=compilation.options(run.config.training),
    )


def lower_step(run: runs.Run, mesh: jax.sharding.Mesh) -> tuple[train_state.TrainState, jax.stages.Lowered]:
    """The shapes of the state, and `train_step` lowered for the mesh, whose devices need not exist here."""
    optimizer = make_optimizer(run.config)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(make_state_fn(run, optimizer, mesh))
        x0 = jax.ShapeDtypeStruct((num_texts(run.config.training), run.config.data.length), jnp.int32)
        step_fn: Any = make_step_fn(run, optimizer, mesh, state)
        return state, step_fn.lower(state, x0)


def check_batch(config: configs.Config, mesh: jax.sharding.Mesh) -> None:
    """Raises errors.UserError if the devices do not divide the sequences of a micro-batch."""
    devices = math.prod(mesh.shape[axis] for axis in sharding.BATCH_AXES)
    per_micro_batch = num_texts(config.training) // config.training.num_micro_batches
    if per_micro_batch % devices:
        raise errors.UserError(
            f"in {errors.name('config.training.num_micro_batches')}={config.training.num_micro_batches} leaves "
            f"{per_micro_batch} sequences for {devices} devices",
            field="config.training.batch_size",
            value=config.training.batch_size,
            remedy="make it divisible",
        )
