"""Compiler options of the training step: only GPUs get them, and XLA knows them."""

import jax
import jax.numpy as jnp
import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.runtime import sharding
from sedd_jax.training import compilation, train_steps

ALL = configs.TrainingConfig(deterministic=True, profile="1:2")
SMALL = {"data.length": 16, "network.hidden_size": 32, "network.num_layers": 1, "network.num_heads": 2}
SMALL |= {"network.dtype": "float32", "training.batch_size": 8}


@pytest.fixture
def on(monkeypatch):
    return lambda platform: monkeypatch.setattr(sharding, "platform", lambda: platform)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_cpus_and_tpus_are_deterministic_and_named_without_options(on, platform):
    on(platform)
    assert compilation.options(ALL) == {}


def test_a_gpu_gets_the_options_that_are_asked_for(on):
    on("gpu")
    assert compilation.options(configs.TrainingConfig()) == {}
    only = compilation.options(configs.TrainingConfig(deterministic=True))
    assert only == {"xla_gpu_deterministic_ops": True, "xla_gpu_exclude_nondeterministic_ops": True}
    assert compilation.options(ALL) == only | {"xla_gpu_enable_command_buffer": ""}


def test_this_version_of_xla_knows_them(on):
    on("gpu")
    assert jax.jit(lambda x: x + 1, compiler_options=compilation.options(ALL))(jnp.ones(())) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_of_no_version": True})(jnp.ones(()))


def lower(**fields):
    run = runs.unsaved(configs.parse(configs.merge(SMALL | fields)), 10)
    return train_steps.lower_step(run, sharding.make_mesh(run.config.mesh))[1]


@pytest.mark.slow
def test_the_program_of_a_deterministic_step_is_the_same(monkeypatch):
    text = lower().as_text()
    assert lower(**{"training.deterministic": True}).as_text() == text


def test_the_training_step_is_compiled_with_the_options(monkeypatch):
    monkeypatch.setattr(compilation, "options", lambda training: {"xla_gpu_of_no_version": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_of_no_version"):
        lower().compile()
