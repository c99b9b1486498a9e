"""Published directories in and out, and broken ones refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from sedd_jax import convert, runs

GOLDEN = pathlib.Path(__file__).parent / "golden"
MODELS = ("absorb_a", "uniform_a")


@pytest.fixture
def published(tmp_path):
    directory = tmp_path / "published"
    shutil.copytree(GOLDEN / "model_absorb_a", directory, copy_function=shutil.copyfile)
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_a_published_directory_comes_back_bit_for_bit(name, tmp_path):
    source, run, back = GOLDEN / f"model_{name}", tmp_path / "run", tmp_path / "back"
    convert.convert(source, run)
    convert.convert(run, back)
    before, after = (safetensors.numpy.load_file(path / "model.safetensors") for path in (source, back))
    assert set(before) == set(after)
    for tensor, value in before.items():
        np.testing.assert_array_equal(value, after[tensor])
    old, new = (json.loads((path / "config.json").read_text()) for path in (source, back))
    assert new["tokens"] == old["tokens"]
    for section in ("graph", "noise", "training"):
        assert {key: new[section][key] for key in new[section]}.items() <= old[section].items()
    assert {**old["model"], "name": new["model"]["name"]} == new["model"]


def test_a_converted_run_is_a_run(published, tmp_path):
    convert.convert(published, tmp_path / "run")
    run = runs.load(tmp_path / "run")
    assert run.graph.num_states == 27
    assert run.network.hidden_size == 64
    assert run.tokenizer.decode(run.tokenizer.encode("3 1 25")) == "3 1 25"
    step, params = run.ema_params()
    assert step == 0
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), params))
    with pytest.raises(ValueError, match="has no text of its own"):
        run.split("valid")


def edit(path, change):
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


def edit_config(path, change):
    content = json.loads((path / "config.json").read_text())
    change(content)
    (path / "config.json").write_text(json.dumps(content))


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "cannot be read as safetensors"),
        (
            lambda path: (path / "model.safetensors").write_bytes(b"<html>not found</html>"),
            "cannot be read as safetensors",
        ),
        (lambda path: edit(path, lambda t: t.pop("blocks.1.norm1.weight")), r"missing \['blocks.1.norm1.weight'\]"),
        (lambda path: edit(path, lambda t: t.update(extra=np.zeros(1))), r"unknown \['extra'\]"),
        (
            lambda path: edit(path, lambda t: t.update({"output_layer.linear.bias": np.zeros(28, np.float32)})),
            r"output_layer.linear.bias has shape \(28,\), but the config means \(27,\)",
        ),
        (
            lambda path: edit(path, lambda t: t["vocab_embed.embedding"].fill(np.nan)),
            "vocab_embed.embedding holds values that are not finite",
        ),
        (lambda path: edit_config(path, lambda c: c.update(tokens=25)), "but the config means"),
        (lambda path: edit_config(path, lambda c: c.update(tokens="26")), "tokens='26'"),
        (lambda path: edit_config(path, lambda c: c["model"].pop("n_heads")), "has no model.n_heads"),
        (
            lambda path: edit_config(path, lambda c: c["graph"].update(type="tree")),
            "config.graph.name='tree' is unknown",
        ),
        (lambda path: (path / "config.json").write_text("{"), "is not JSON"),
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (lambda path: (path / "model.safetensors").unlink(), "has neither model.safetensors"),
    ],
)
def test_broken_directories_are_refused_and_nothing_is_written(published, tmp_path, damage, message):
    damage(published)
    with pytest.raises(ValueError, match=message) as caught:
        convert.convert(published, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_tokenizer_of_another_size_is_refused(published, tmp_path):
    with pytest.raises(ValueError, match="text8 has 27 tokens, the checkpoint 26"):
        convert.convert(published, tmp_path / "run", tokenizer="text8")
