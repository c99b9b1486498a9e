"""The options of an optimizer step: runs with them resume bit for bit, on any mesh, and pairs are what they say."""

import functools
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.diffusion import time_laws
from sedd_jax.model import networks, train_state
from sedd_jax.runtime import errors
from sedd_jax.training import train, train_steps
from tests.support import small_runs

OPTIONS = {
    "muon": {"optimizer.name": "muon", "optimizer.schedule": "wsd"},
    "pairs": {
        "training.paired_noise": True,
        "training.time_law": "learned",
        "training.num_micro_batches": 2,
        "optimizer.schedule": "cosine",
    },
}


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    """(fields) -> a config of four steps on letters."""
    source = small_runs.write_letters(tmp_path_factory.mktemp("text"), 3_000)

    def make(fields):
        settings = {
            "data": {"source": source, "tokenizer": "characters", "length": 16},
            "network": {"hidden_size": 32, "num_heads": 2, "num_layers": 2, "cond_dim": 16, "dtype": "float32"},
            "optimizer": {"warmup_steps": 1, "learning_rate": 1e-2, "eps": 1e-3},
            "training": {"num_steps": 4, "batch_size": 32, "log_every": 1, "eval_every": 0, "sample_every": 0},
        }
        settings["training"]["checkpoint_every"] = 2
        config = configs.merge(settings)
        config.update_from_flattened_dict(fields)
        return configs.parse(config)

    return make


def _train(config, workdir, num_devices, **options):
    """Trains on some of the harness' eight devices, because each further one costs time. Returns what was said."""
    devices, stream = jax.devices()[:num_devices], io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        train.train(config, workdir, stream=stream, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def trained(make_config, tmp_path_factory):
    """(option) -> the directory of its run on one device."""

    @functools.cache
    def make(option):
        workdir = tmp_path_factory.mktemp(option) / "run"
        _train(make_config(OPTIONS[option]), workdir, 1)
        return workdir

    return make


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_resumes_bit_for_bit(make_config, trained, tmp_path, option):
    shutil.copytree(trained(option), tmp_path / "again")
    assert "at step 2" in _train(make_config(OPTIONS[option]), tmp_path / "again", 1, from_step=2)
    found, expected = (runs.load(workdir) for workdir in (tmp_path / "again", trained(option)))
    assert small_runs.logged(found.workdir) == small_runs.logged(expected.workdir)
    for name in ("params", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, found.params(name)[1], expected.params(name)[1])


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_a_mesh_changes_only_the_rounding(make_config, trained, tmp_path, option):
    config = make_config(OPTIONS[option] | {"mesh.fsdp": 2, "mesh.tensor": 2})
    _train(config, tmp_path / "run", 4)
    found, expected = (runs.load(workdir).params("params")[1] for workdir in (tmp_path / "run", trained(option)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected)


def test_a_step_noises_each_text_of_a_pair_at_the_other_half_of_its_positions(make_config, monkeypatch):
    config = make_config(OPTIONS["pairs"])
    run = runs.unsaved(config, vocab_size=9)
    seen, apply = [], networks.apply

    def recorded(model, xt, *rest):
        jax.debug.callback(lambda xt: seen.append(np.asarray(xt)), xt)
        return apply(model, xt, *rest)

    monkeypatch.setattr(networks, "apply", recorded)
    x0 = np.random.default_rng(0).integers(0, 9, (train_steps.num_texts(config.training), 16)).astype(np.int32)
    assert x0.shape == (16, 16)
    optimizer = train_steps.make_optimizer(config)
    state = train_state.create(jax.random.key(0), run.network, optimizer)
    step = jax.jit(functools.partial(train_steps.train_step, run=run, optimizer=optimizer))
    jax.block_until_ready(step(state, jnp.asarray(x0)))
    jax.effects_barrier()
    xt = np.concatenate(seen)
    assert xt.shape == (32, 16)
    is_mask = xt == run.graph.mask_id
    np.testing.assert_array_equal(is_mask[0::2], ~is_mask[1::2])
    # Each copy keeps tokens of one text: what both know together is the text.
    together = np.where(is_mask[0::2], xt[1::2], xt[0::2])
    assert sorted(map(tuple, together)) == sorted(map(tuple, x0))


def test_a_step_remembers_the_loss_of_each_sequence_at_its_time(make_config, monkeypatch):
    """Without the weights of times and of micro-batches: with them, the mean is the loss of the step."""
    config = make_config(OPTIONS["pairs"])
    run = runs.unsaved(config, vocab_size=9)
    seen, add_losses = [], time_laws.add_losses

    def recorded(moments, t, found):
        jax.debug.callback(lambda *arrays: seen.extend(map(np.asarray, arrays)), t, found)
        return add_losses(moments, t, found)

    monkeypatch.setattr(time_laws, "add_losses", recorded)
    optimizer = train_steps.make_optimizer(config)
    state = train_state.create(jax.random.key(0), run.network, optimizer)
    squares = np.random.default_rng(0).uniform(1, 9, time_laws.NUM_INTERVALS)
    moments = time_laws.Moments(jnp.asarray(squares), jnp.ones(time_laws.NUM_INTERVALS))
    state = state.replace(opt_state=(moments, *state.opt_state[1:]))
    step = jax.jit(functools.partial(train_steps.train_step, run=run, optimizer=optimizer))
    new, metrics = jax.block_until_ready(step(state, jnp.zeros((16, 16), jnp.int32)))
    jax.effects_barrier()
    t, found = seen
    place = ((t - time_laws.T_MIN) / (1 - time_laws.T_MIN) * time_laws.NUM_INTERVALS).astype(int)
    weights = 1 / np.asarray(time_laws.density(moments, symmetric=True))[place]
    np.testing.assert_allclose((weights * found).mean(), 16 * metrics["train/loss"], rtol=1e-5)
    np.testing.assert_allclose(new.opt_state[0].counts.sum(), 32 + 0.99 * time_laws.NUM_INTERVALS, rtol=1e-6)


def test_pairs_that_cannot_be_are_refused(make_config):
    for fields, message in (
        ({"training.batch_size": 6, "training.num_micro_batches": 2}, "must be even in each micro-batch"),
        ({"graph.name": "autoregressive", "network.scale_by_sigma": False}, "has no meaning for autoregressive"),
    ):
        with pytest.raises(errors.UserError, match=message):
            make_config({"training.paired_noise": True} | fields)
