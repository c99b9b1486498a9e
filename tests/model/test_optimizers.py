"""The published optimizer against five recorded steps; the other schedules, and Muon against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sedd_jax.conversion import torch_weights
from sedd_jax.model import networks, optimizers
from tests.support import goldens, weights

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
    optimizer = optimizers.make_optimizer(config, num_steps=100)

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


@goldens.cases("optim/.*", slow="uniform")
def test_recorded_parameters_and_average(entry):
    run, quantity = entry.file.removeprefix("optim/").removesuffix(".safetensors").rsplit(".", 1)
    entry.check(recorded_run(run)[quantity])


@goldens.cases("optim.npz", r"\.(lr|ema_decay|hyper)$")
def test_recorded_schedules(entry):
    run, quantity = entry.name.rsplit(".", 1)
    config = recorded_config(run)
    with jax.enable_x64(True):
        if quantity == "lr":
            entry.check([optimizers.learning_rate(config, step, 100) for step in range(5)])
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
    assert optimizers.learning_rate(config, 0, 100) == pytest.approx(3e-4 / 2500)
    assert (
        optimizers.learning_rate(config, 2499, 100)
        == optimizers.learning_rate(config, 10**6, 100)
        == pytest.approx(3e-4)
    )


def test_no_warm_up():
    assert optimizers.learning_rate(optimizers.OptimizerConfig(warmup_steps=0), 0, 100) == pytest.approx(3e-4)


def test_average_reaches_its_largest_decay():
    average = optimizers.update_ema({"w": jnp.ones(3)}, {"w": jnp.zeros(3)}, 10**6, 0.9999)
    np.testing.assert_allclose(average["w"], 0.9999, rtol=1e-6)


def test_a_rate_falls_to_nothing_at_the_end():
    config = {"learning_rate": 1.0, "warmup_steps": 10}
    wsd = optimizers.OptimizerConfig(schedule="wsd", decay_share=0.25, **config)
    found = [float(optimizers.learning_rate(wsd, step, 200)) for step in (0, 9, 100, 150, 175, 199, 200, 300)]
    np.testing.assert_allclose(found, [0.1, 1, 1, 1, 0.5, 0.02, 0, 0], rtol=1e-6)
    cosine = optimizers.OptimizerConfig(schedule="cosine", **config)
    found = [float(optimizers.learning_rate(cosine, step, 200)) for step in (0, 9, 10, 105, 200, 300)]
    np.testing.assert_allclose(found, [0.1, 1, 1, 0.5, 0, 0], atol=1e-7)
    whole = optimizers.OptimizerConfig(schedule="wsd", decay_share=0.0, **config)
    assert float(optimizers.learning_rate(whole, 199, 200)) == 1


@pytest.fixture(scope="module")
def muon():
    """A Muon update at learning rate 0.5, and the gradients and parameters that it was made of."""
    sizes = networks.NetworkConfig(num_states=12, hidden_size=16, num_layers=2, num_heads=2, cond_dim=8)
    params, gradients = weights.drawn(sizes, 0), weights.drawn(sizes, 1)
    config = optimizers.OptimizerConfig(name="muon", learning_rate=0.5, warmup_steps=0, clip_norm=1e9)
    optimizer = optimizers.make_optimizer(config, num_steps=10)
    update = jax.jit(lambda: optimizer.update(gradients, optimizer.init(params), params)[0])
    return update(), gradients, params


MATRICES = ["qkv", "attention_out", "mlp_in", "mlp_out"]


@pytest.mark.parametrize("name", MATRICES)
def test_muon_moves_each_layers_matrix_by_an_orthogonal_one(muon, name):
    """All singular values are near one number, and the update points along the gradient."""
    for update, gradient in zip(muon[0]["blocks"][name]["kernel"], muon[1]["blocks"][name]["kernel"], strict=True):
        left, scales, right = np.linalg.svd(gradient, full_matrices=False)
        values = -np.diag(left.T @ update @ right.T) / (0.5 * 0.2 * np.sqrt(max(update.shape)))
        # Five iterations do not reach directions in which the gradient is next to nothing.
        values = values[scales > 0.1 * scales.max()]
        assert len(values) > 0.8 * min(update.shape)
        assert (values > 0.6).all()
        assert (values < 1.3).all()
        # Its root mean square is that of an Adam update.
        assert 0.5 * 0.12 < np.sqrt(np.mean(np.square(update))) < 0.5 * 0.25


def test_muon_leaves_all_other_arrays_to_adamw(muon):
    updates, gradients, params = muon
    adam = optax.adamw(0.5, eps=1e-8, weight_decay=0.0, nesterov=True)
    expected = jax.jit(lambda: adam.update(gradients, adam.init(params), params)[0])()

    def others(tree):
        blocks = {name: part for name, part in tree["blocks"].items() if name not in MATRICES}
        return {**tree, "blocks": blocks, "bias": [tree["blocks"][name]["bias"] for name in ("mlp_in", "mlp_out")]}

    assert sorted(others(updates)["blocks"]) == ["attention_norm", "mlp_norm", "modulation"]
    jax.tree.map(np.testing.assert_array_equal, others(updates), others(expected))


def test_a_norm_of_0_clips_nothing():
    """Other programs write 0 for no clipping. Gradients of norm 0 would train nothing, without a word."""
    gradients = {"w": jnp.array([3.0, 4.0])}
    np.testing.assert_array_equal(optimizers.clip(gradients, 0.0)["w"], gradients["w"])
    np.testing.assert_allclose(optimizers.clip(gradients, 1.0)["w"], [0.6, 0.8], rtol=1e-6)
