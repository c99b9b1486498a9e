"""Runs that start from another run's weights: which are taken, which stay fresh, and which runs are refused."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.model import optimizers
from sedd_jax.runtime import sharding
from sedd_jax.training import train
from tests.support import slow

MESH = sharding.MeshConfig()


@pytest.fixture
def fine_tune(code_run, tmp_path):
    """(fields) -> a config that starts from `code_run`, with these fields changed."""

    def make(**changed):
        nested = configs.to_dict(runs.load(code_run).config)
        flat = configs.flatten(nested) | {"init_from": str(code_run), "optimizer.warmup_steps": 0} | changed
        return configs.parse(configs.merge(flat))

    return make


def fresh_state(config, workdir):
    """The state that a run of this config starts with, the message about it, and the run."""
    runs.start(workdir, config)
    run = runs.load(workdir)
    mesh = sharding.make_mesh(MESH)
    with jax.set_mesh(mesh):
        saved = train.checkpoints.Checkpoints(run.checkpoint_dir, keep=1)
        state, step, said = train.initial_state(
            run, optimizers.make_optimizer(config.optimizer, config.training.num_steps), mesh, saved
        )
        saved.close()
    assert step == 0
    assert int(state.step) == 0
    return state, said, run


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("length", slow.all_but([48], [32, 16, 48]))
def test_weights_are_the_moving_average_at_any_length(code_run, fine_tune, tmp_path, length):
    state, said, _ = fresh_state(fine_tune(**{"data.length": length}), tmp_path / "run")
    step, source = runs.load(code_run).params("ema_params", sharding.make_mesh(MESH))
    assert_same(state.params, source)
    assert_same(state.ema_params, source)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    assert said.startswith(f"weights are those of step {step} of {code_run}, averaged")
    assert ("its length was 32" in said) == (length != 32)
    assert "tokens" not in said


def test_other_tokens_get_a_fresh_embedding_and_head(code_run, fine_tune, tmp_path):
    state, said, run = fresh_state(fine_tune(**{"data.tokenizer": "bytes"}), tmp_path / "run")
    _, source = runs.load(code_run).params("ema_params", sharding.make_mesh(MESH))
    scratch, _, _ = fresh_state(dataclasses.replace(run.config, init_from=""), tmp_path / "scratch")
    for name, leaf in state.params.items():
        of_tokens = name in ("embedding", "head_kernel", "head_bias")
        assert_same(leaf, (scratch.params if of_tokens else source)[name])
    assert "its tokens are others (characters there, bytes here), so embedding and head are fresh" in said


@pytest.mark.slow
def test_training_goes_on_without_its_source(fine_tune, tmp_path, code_run):
    """A run reads the source once. When it resumes, it does not need it."""
    config = fine_tune(**{"training.num_steps": 3, "training.checkpoint_every": 2})
    told = io.StringIO()
    workdir = tmp_path / "run"
    train.train(config, workdir, stream=told)
    assert f"weights are those of step 2 of {code_run}, averaged" in told.getvalue()
    gone = json.loads((workdir / "config.json").read_text()) | {"init_from": str(tmp_path / "gone")}
    (workdir / "config.json").write_text(json.dumps(gone))
    longer = dataclasses.replace(config.training, num_steps=4)
    told = io.StringIO()
    config = dataclasses.replace(config, init_from=str(tmp_path / "gone"), training=longer)
    assert train.train(config, workdir, stream=told)["step"] == 4
    assert "weights are those" not in told.getvalue()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"graph.name": "uniform", "network.scale_by_sigma": False},
            "has config.graph.name=absorb, this run uniform: what the one has learned means nothing to the other",
        ),
        ({"graph.name": "autoregressive", "network.scale_by_sigma": False}, "this run autoregressive"),
        ({"network.hidden_size": 64}, "config.network.hidden_size=64 must be 32, as in config.init_from="),
        ({"network.num_layers": 2}, "config.network.num_layers=2 must be 1"),
        ({"network.num_heads": 4}, "config.network.num_heads=4 must be 2"),
        ({"network.normalize": True}, "config.network.normalize=True must be False"),
        ({"network.scale_by_sigma": False}, "config.network.scale_by_sigma=False must be True"),
        ({"init_from": "nowhere"}, "config.init_from=nowhere is no run directory: `sedd convert --from=nowhere"),
    ],
)
def test_other_networks_are_refused_and_nothing_is_written(fine_tune, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message) as caught:
        train.train(fine_tune(**changed), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_start_that_is_repeated_takes_the_same_weights(fine_tune, tmp_path, code_run):
    """Though the source has trained on since."""
    source = shutil.copytree(code_run, tmp_path / "source")
    config = fine_tune(init_from=str(source))
    first, said, _ = fresh_state(config, tmp_path / "run")
    on = configs.flatten(configs.to_dict(runs.load(source).config)) | {"training.num_steps": 3}
    train.train(configs.parse(configs.merge(on)), source, stream=io.StringIO())
    again, said_again, _ = fresh_state(config, tmp_path / "run")
    assert said == said_again
    assert_same(first.params, again.params)
