"""The published optimizer: five recorded training steps with their moving average, and the schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sedd_jax.conversion import torch_weights
from sedd_jax.model import optimizers
from tests.support import goldens

RUNS = ["absorb_a.loglinear.clip1", "uniform_a.geo.clip300wd"]


@functools.cache
def hyper(run: str) -> dict[str, float]:
    names = ("learning_rate", "warmup_steps", "weight_decay", "clip_norm", "accum", "steps")
    names += ("beta1", "beta2", "eps", "ema_decay")
    return dict(zip(names, goldens.load("optim.npz")[f"{run}.hyper"], strict=True))


def recorded_config(run: str) -> optimizers.OptimizerConfig:
    values = {name: float(value) for name, value in hyper(run).items() if name not in ("accum", "steps")}
    return optimizers.OptimizerConfig(**values | {"warmup_steps": round(values["warmup_steps"])})


@functools.cache
def recorded_run(run: str) -> dict:
    """Ours for a recorded run of five steps."""
    name, noise, _ = run.split(".")
    network, _, params = goldens.model(name)
    config = recorded_config(run)
    optimizer = optimizers.make_optimizer(config)

    @jax.jit
    def step(n, params, ema_params, opt_state, x0, xt, t):
        loss = functools.partial(goldens.mean_loss, name, noise)
        (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params, x0, xt, t)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        ema_params = optimizers.update_ema(ema_params, params, n, config.ema_decay)
        return params, ema_params, opt_state, value, optax.tree.norm(gradient)

    batches = [jnp.asarray(goldens.load("optim.npz")[f"{run}.{key}"]) for key in ("x0", "xt", "t")]
    ema_params, opt_state = params, optimizer.init(params)
    values, norms = [], []
    for n, batch in enumerate(zip(*batches, strict=True), start=1):
        params, ema_params, opt_state, value, norm = step(n, params, ema_params, opt_state, *batch)
        values.append(value)
        norms.append(norm)
    return {
        "loss": jnp.stack(values),
        "grad_norm": jnp.stack(norms),
        "params": torch_weights.to_torch(params, network),
        "ema": torch_weights.to_torch(ema_params, network),
    }


@goldens.cases("optim.npz", r"\.(loss|grad_norm)(__f64)?$", slow="uniform")
def test_recorded_losses_and_norms(entry):
    run, quantity = entry.name.removesuffix("__f64").rsplit(".", 1)
    entry.check(recorded_run(run)[quantity])


@goldens.cases("optim/.*")
def test_recorded_parameters_and_average(entry):
    run, quantity = entry.file.removeprefix("optim/").removesuffix(".safetensors").rsplit(".", 1)
    entry.check(recorded_run(run)[quantity])


@goldens.cases("optim.npz", r"\.(lr|ema_decay|hyper)$")
def test_recorded_schedules(entry):
    run, quantity = entry.name.rsplit(".", 1)
    config = recorded_config(run)
    with jax.enable_x64(True):
        if quantity == "lr":
            entry.check([optimizers.learning_rate(config, step) for step in range(5)])
        elif quantity == "ema_decay":
            # From an average of 1 toward 0, what is left is the decay.
            one, zero = jnp.ones(()), jnp.zeros(())
            entry.check([optimizers.update_ema(one, zero, n, config.ema_decay) for n in range(1, 6)])
        else:
            assert (hyper(run)["accum"], hyper(run)["steps"]) == (1, 5)
            assert (config.beta1, config.beta2, config.eps, config.ema_decay) == (0.9, 0.999, 1e-8, 0.9999)


def test_published_defaults():
    config = optimizers.OptimizerConfig()
    assert (config.learning_rate, config.warmup_steps, config.weight_decay, config.clip_norm) == (3e-4, 2500, 0.0, 1.0)
    assert (config.beta1, config.beta2, config.eps, config.ema_decay) == (0.9, 0.999, 1e-8, 0.9999)
    assert optimizers.learning_rate(config, 0) == pytest.approx(3e-4 / 2500)
    assert optimizers.learning_rate(config, 2499) == optimizers.learning_rate(config, 10**6) == pytest.approx(3e-4)


def test_no_warm_up():
    assert optimizers.learning_rate(optimizers.OptimizerConfig(warmup_steps=0), 0) == pytest.approx(3e-4)


def test_average_reaches_its_largest_decay():
    average = optimizers.update_ema({"w": jnp.ones(3)}, {"w": jnp.zeros(3)}, 10**6, 0.9999)
    np.testing.assert_allclose(average["w"], 0.9999, rtol=1e-6)
