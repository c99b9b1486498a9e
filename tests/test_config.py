import dataclasses
import importlib.util

import pytest

from sedd_jax import config as configs
from sedd_jax import config_files
from sedd_jax.runtime import errors
from tests.support import places

CONFIGS = sorted((places.REPOSITORY / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return configs.parse(configs.merge(module.get_config()))


def test_defaults_are_the_published_hyper_parameters():
    config = configs.parse(configs.default())
    assert config == configs.Config()
    assert (config.network.hidden_size, config.network.num_layers, config.network.num_heads) == (768, 12, 12)
    assert dataclasses.asdict(config.optimizer) == {
        "name": "adamw",
        "learning_rate": 3e-4,
        "warmup_steps": 2500,
        "schedule": "constant",
        "decay_share": 0.2,  # Of another schedule.
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "ema_decay": 0.9999,
    }
    assert (config.training.batch_size, config.data.length, config.network.dropout) == (512, 1024, 0.1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_valid_and_opens_with_its_command(path):
    load(path)
    assert f"sedd train --config=configs/{path.name} --workdir=" in path.read_text(encoding="utf-8")


def test_a_section_is_no_field():
    message = r"^config.mesh holds fields of its own: set one, as in config.mesh.data$"
    with pytest.raises(errors.UserError, match=message):
        configs.check_field("mesh", configs.default())


def test_issue_configs_exist():
    names = {path.stem for path in CONFIGS}
    assert names >= {"quickstart", "text8", "owt_small", "owt_medium", "owt_small_uniform", "lm1b"}


@pytest.mark.parametrize(
    ("partial", "message"),
    [
        (
            {"network": {"hiden_size": 3}},
            "config.network.hiden_size is not a field: did you mean config.network.hidden_size?",
        ),
        ({"network": {"hidden_size": "x"}}, "config.network.hidden_size='x' must be of type int"),
        ({"network": {"hidden_size": 100}}, "config.network.hidden_size=100 must be divisible by twice"),
        ({"graph": {"name": "uniform"}}, "set it to False for uniform"),
        ({"graph": {"name": "absorbing"}}, "config.graph.name=absorbing is unknown: choose one of absorb, uniform"),
        (
            {"sampling": {"sampler": "analytic"}},
            "config.sampling.sampler=analytic is unknown: choose one of tweedie, euler, tau_leaping",
        ),
        (
            {"sampling": {"corrector": "gibs"}},
            "config.sampling.corrector=gibs is unknown: choose one of forward_backward, gibbs, gibbs:margin:K",
        ),
        (
            {"sampling": {"corrector": "gibbs", "corrector_steps": 1}},
            "config.sampling.corrector=gibbs redraws tokens from the score of a graph without masks (uniform)",
        ),
        (
            {
                "sampling": {"corrector": "gibbs:margin:4"},
                "graph": {"name": "uniform"},
                "network": {"scale_by_sigma": False},
            },
            "config.sampling.corrector=gibbs:margin:4 does nothing with config.sampling.corrector_steps=0",
        ),
        ({"training": {"batch_size": 0}}, "config.training.batch_size=0 must be at least 1"),
        ({"training": {"num_micro_batches": 3}}, "config.training.batch_size=512 must be divisible by"),
        ({"optimizer": {"learning_rate": -1.0}}, "config.optimizer.learning_rate=-1.0 must be a finite number"),
        ({"optimizer": {"learning_rate": float("nan")}}, "must be a finite number"),
        ({"noise": {"eps": 1e-8}}, "config.noise.eps=1e-08 must be at least 1e-7"),
        ({"noise": {"eps": 1.0}}, "config.noise.eps=1.0 must be below 1"),
        ({"noise": {"sigma_max": 89.0}}, "config.noise.sigma_max=89.0 must be below 88"),
        ({"network": {"dropout": 1.0}}, "config.network.dropout=1.0 must be below 1"),
        ({"optimizer": {"beta1": 1.0}}, "config.optimizer.beta1=1.0 must be below 1"),
        ({"optimizer": {"beta2": 1.5}}, "config.optimizer.beta2=1.5 must be below 1"),
        ({"optimizer": {"eps": 0.0}}, "config.optimizer.eps=0.0 must be above 0, since gradients may be 0"),
        ({"training": {"num_steps": 10**10}}, "config.training.num_steps=10000000000 must be below 2**31"),
        ({"network": {"dtype": "float16"}}, "choose one of float32, bfloat16"),
        *(
            ({"training": {"profile": text}}, f"config.training.profile={text} is not START:STEPS: give 1000:3")
            for text in ("1000", "3:0", "-1:3", "3:-1", "a:b", "1:2:3", "1:2.5")
        ),
    ],
)
def test_bad_values_get_one_line_with_the_value_and_the_remedy(partial, message):
    with pytest.raises(errors.UserError, match="config") as caught:
        configs.parse(configs.merge(partial))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_taken_for_floats_but_not_the_other_way():
    assert configs.parse(configs.merge({"optimizer": {"learning_rate": 1}})).optimizer.learning_rate == 1.0
    with pytest.raises(errors.UserError, match="must be of type int"):
        configs.parse(configs.merge({"seed": 1.5}))


def test_every_field_is_described():
    described = {name: meaning for name, _, meaning in configs.describe(configs.default())}
    assert set(described) == set(configs.flatten(configs.to_dict(configs.Config())))
    assert all(meaning.endswith(".") for meaning in described.values())


def test_json_round_trip():
    config = configs.parse(configs.merge({"seed": 3, "network": {"num_layers": 2}}))
    assert configs.parse(configs.to_dict(config)) == config


def test_a_resumed_run_may_change_how_long_it_runs_but_not_what_it_is():
    old = configs.Config()
    changed = {"num_steps": 7, "eval_every": 3, "profile": "3:2", "deterministic": True}
    longer = dataclasses.replace(old, training=dataclasses.replace(old.training, **changed))
    assert configs.changes(old, longer) == []
    other = dataclasses.replace(old, optimizer=dataclasses.replace(old.optimizer, learning_rate=1e-3))
    assert configs.changes(old, other) == ["config.optimizer.learning_rate was 0.0003 and is now 0.001"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size = 12", "has no attribute 'get_config': mend the file"),
        ("def get_config(size): return {}", "missing 1 required positional argument: 'size': mend the file"),
        ("def get_config(): return None", "returns None, which is no dict of fields: mend get_config"),
        ("def get_config(): return [1]", r"returns \[1\], which is no dict of fields"),
        ("import sys; sys.exit(3)", "fails with SystemExit: 3: mend the file"),
        ("def get_config(:", "fails with SyntaxError"),
    ],
)
def test_a_config_file_that_gives_no_fields_is_named(tmp_path, text, message):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(errors.UserError, match=rf"config={path} .*{message}"):
        config_files.read_python(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({1: 2}, "config has the key 1, which is not text: `sedd train --help` lists"),
        ({None: {}}, "config has the key None, which is not text"),
        ({("data", "length"): 2}, r"config has the key \('data', 'length'\), which is not text"),
        ({"data": {1: 2}}, "config.data has the key 1, which is not text"),
        ({"data": {b"length": 2}}, "config.data has the key b'length', which is not text"),
        ({"data": {"length": {1: 2}}}, "config.data.length=.* must be of type int"),
        ({"seed": {}}, "config.seed={} must be of type int"),
        ({"data": None}, "config.data=None holds no fields: `sedd train --help` lists"),
        ({"data": [1]}, r"config.data=\[1\] holds no fields"),
        ({"network": "small"}, "config.network='small' holds no fields"),
        ({"nets": {}}, "config.nets is not a field"),
    ],
)
def test_a_config_file_with_fields_that_are_none_is_named(tmp_path, fields, message):
    path = tmp_path / "c.py"
    path.write_text(f"def get_config(): return {fields!r}")
    with pytest.raises(errors.UserError, match=f"^{message}"):
        configs.merge(config_files.read_python(path))


def test_an_endless_config_is_refused():
    endless = {}
    endless["data"] = endless
    with pytest.raises(errors.UserError, match=r"^config.data.data is not a field"):
        configs.merge(endless)


@pytest.mark.parametrize("value", [None, [], [1], [["length", 1]], "text", 5])
@pytest.mark.parametrize("read", [config_files.read_saved, configs.parse], ids=["of_a_run", "of_python"])
def test_a_saved_config_whose_section_is_none_is_named(read, value):
    saved = configs.to_dict(configs.Config()) | {"data": value}
    with pytest.raises(errors.UserError, match=r"^config.data=.* holds no fields"):
        read(saved)
