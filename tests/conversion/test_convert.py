"""Conversion in both directions, its verification, and errors for broken checkpoints."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install -e '.[test-all]'")

import safetensors.numpy

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.conversion import convert, torch_model, torch_weights
from sedd_jax.data import tokenizers
from sedd_jax.model import networks, optimizers, score_heads, train_state
from sedd_jax.runtime import errors
from tests.support import foreign, places, slow, weights

GOLDEN = places.GOLDEN
MODELS = ("absorb_a", "uniform_a")


def run_convert(source, directory, *, to_format=None, dtype="float32", **options):
    target = convert.Target(directory=directory, to_format=to_format, dtype=dtype)
    return convert.convert(source, target, **options)


@pytest.fixture
def published(tmp_path):
    directory = tmp_path / "published"
    shutil.copytree(GOLDEN / "model_absorb_a", directory, copy_function=shutil.copyfile)
    return directory


@pytest.mark.parametrize("name", MODELS)
def test_a_published_directory_comes_back_bit_for_bit(name, tmp_path):
    source, run, back = GOLDEN / f"model_{name}", tmp_path / "run", tmp_path / "back"
    run_convert(source, run)
    run_convert(run, back)
    before, after = (safetensors.numpy.load_file(path / "model.safetensors") for path in (source, back))
    assert set(before) == set(after)
    for tensor, value in before.items():
        np.testing.assert_array_equal(value, after[tensor])
    old, new = (json.loads((path / "config.json").read_text()) for path in (source, back))
    assert new["tokens"] == old["tokens"]
    assert new["noise"].pop("eps") == 1e-3  # The published program has no field for it.
    for section in ("graph", "noise", "training", "optim"):
        assert new[section].items() <= old[section].items()
    assert {**old["model"], "name": new["model"]["name"]} == new["model"]


def test_a_converted_run_is_a_run(published, tmp_path):
    run_convert(published, tmp_path / "run")
    run = runs.load(tmp_path / "run")
    assert run.graph.num_states == 27
    assert run.network.hidden_size == 64
    assert run.tokenizer.decode(run.tokenizer.encode("3 1 25")) == "3 1 25"
    step, params = run.params("ema_params")
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
            r"output_layer.linear.bias has shape \(28,\), but the config implies \(27,\)",
        ),
        (
            lambda path: edit(path, lambda t: t["vocab_embed.embedding"].fill(np.nan)),
            "vocab_embed.embedding holds values that are not finite",
        ),
        (lambda path: edit_config(path, lambda c: c.update(tokens=25)), "but the config implies"),
        (lambda path: edit_config(path, lambda c: c.update(tokens="26")), "tokens='26'"),
        (lambda path: edit_config(path, lambda c: c["model"].pop("n_heads")), "has no model.n_heads"),
        (
            lambda path: edit_config(path, lambda c: c["graph"].update(type="tree")),
            "config.graph.name=tree is unknown",
        ),
        (lambda path: (path / "config.json").write_text("{"), "is not JSON"),
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (
            lambda path: (path / "model.safetensors").unlink(),
            "is not a checkpoint: give a run directory, a directory with config.json and",
        ),
    ],
)
def test_broken_directories_are_refused_and_nothing_is_written(published, tmp_path, damage, message):
    damage(published)
    with pytest.raises(ValueError, match=message) as caught:
        run_convert(published, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_tokenizer_of_another_size_is_refused(published, tmp_path):
    with pytest.raises(
        ValueError, match="tokenizer=text8 has 27 tokens, but the checkpoint has 26: give the tokenizer"
    ):
        run_convert(published, tmp_path / "run", tokenizer="text8")


@pytest.fixture
def make_run(tmp_path):
    """Makes a run directory with random weights and another moving average."""

    def make(tokenizer=None, graph="absorb", source="", **network):
        tokenizer = tokenizer or tokenizers.build("text8", lambda: ())
        data = configs.DataConfig(length=16, source=source)
        config = configs.Config(graph=configs.GraphConfig(name=graph), data=data)
        sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "cond_dim": 16, "dtype": "float32"}
        scaled = {"scale_by_sigma": graph == "absorb"}
        config = dataclasses.replace(config, network=dataclasses.replace(config.network, **(sizes | scaled | network)))
        run = runs.Run(workdir=tmp_path / "run", config=config, tokenizer=tokenizer)
        params, optimizer = weights.drawn(run.network, 0), optimizers.make_optimizer(config.optimizer, 4)
        state = train_state.TrainState(
            step=jnp.int32(7),
            params=params,
            ema_params=weights.drawn(run.network, 1),
            opt_state=jax.jit(optimizer.init)(params),
        )
        (tmp_path / "run").mkdir()
        return runs.fill(tmp_path / "run", config, tokenizer, state), state

    return make


def load(path):
    return safetensors.numpy.load_file(path / "model.safetensors")


@pytest.mark.slow
def test_weights_are_averaged_or_raw(make_run, tmp_path):
    run, state = make_run()
    for name, params in (("ema", state.ema_params), ("raw", state.params)):
        result = run_convert(tmp_path / "run", tmp_path / name, weights=name, verify=False)
        assert (result["weights"], result["step"], result["to_format"]) == (name, 7, "torch")
        expected = torch_weights.to_torch(params, run.network)
        for tensor, x in load(tmp_path / name).items():
            np.testing.assert_array_equal(x, expected[tensor], tensor)


def test_what_is_written_says_where_it_comes_from(make_run, tmp_path):
    run, _ = make_run()
    result = run_convert(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "sedd"
    origin = config["sedd_jax"]
    assert origin["config"] == configs.to_dict(run.config)
    assert (origin["from"], origin["step"], origin["weights"]) == ("run", 7, "ema")
    assert origin["revision"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", origin["revision"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{result['num_parameters']:,} parameters in float32" in card
    assert result["num_parameters"] == sum(x.size for x in load(tmp_path / "out").values()) - 8  # rotary frequencies
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]
    run_convert(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "origin.json").read_text())["from"] == str(tmp_path / "out")
    assert runs.load(tmp_path / "back").tokenizer == run.tokenizer


def test_what_is_written_names_no_directory_of_this_machine(make_run, tmp_path):
    make_run(source=f"text:{tmp_path}/books/{{split}}.txt")
    run_convert(tmp_path / "run", tmp_path / "out", verify=False)
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert json.loads((tmp_path / "out" / "config.json").read_text())["data"]["train"] == "text:{split}.txt"


def test_a_tokenizer_travels_with_its_file(tmp_path, make_run):
    pieces = ["[UNK]", "[SEP]", *"abc", "[MASK]"]
    (tmp_path / "pieces.txt").write_text("\n".join(pieces))
    make_run(tokenizers.build(f"wordpiece:{tmp_path / 'pieces.txt'}", lambda: ()))
    (tmp_path / "pieces.txt").unlink()
    run_convert(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    run_convert(tmp_path / "moved", tmp_path / "back")
    shutil.rmtree(tmp_path / "moved")
    assert runs.load(tmp_path / "back").tokenizer.decode(np.array([2, 3, 4])) == "a b c"


@pytest.mark.parametrize("dtype", slow.all_but(["bfloat16"], ["bfloat16", "float16"]))
def test_half_precision_rounds_weights_alone(make_run, tmp_path, dtype):
    run, state = make_run()
    result = run_convert(tmp_path / "run", tmp_path / "out", dtype=dtype)
    assert result["largest_difference"] < 1e-4 * result["largest_logit"]
    assert result["largest_score_difference"] < 1e-4 * result["largest_log_score"]
    expected = torch_weights.to_torch(state.ema_params, run.network)
    for name, x in load(tmp_path / "out").items():
        assert x.dtype == (np.float32 if name == torch_weights.ROTARY else jnp.dtype(dtype))
        np.testing.assert_array_equal(x, expected[name].astype(x.dtype), name)
    run_convert(tmp_path / "out", tmp_path / "back")
    # The padding is not saved. All other values come back as they were rounded.
    back = torch_weights.to_torch(runs.load(tmp_path / "back").params("ema_params")[1], run.network)
    for name, x in load(tmp_path / "out").items():
        np.testing.assert_array_equal(back[name], x.astype(np.float32), name)


def test_values_that_half_precision_does_not_hold_are_named(published, tmp_path):
    edit(published, lambda t: t["output_layer.linear.bias"].fill(1e6))
    with pytest.raises(ValueError, match=r"dtype=float16 cannot hold the values of output_layer\.linear\.bias"):
        run_convert(published, tmp_path / "out", to_format="torch", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to_format", ["torch", "jax"])
def test_networks_that_disagree_are_not_written(published, tmp_path, monkeypatch, to_format):
    arrange = torch_weights.arrange

    def wrong(tensors, config, numpy):
        params = arrange(tensors, config, numpy)
        q, k, v = numpy.split(params["blocks"]["qkv"]["kernel"], 3, axis=-1)
        params["blocks"]["qkv"]["kernel"] = numpy.concatenate([k, v, q], axis=-1)
        return params

    monkeypatch.setattr(torch_weights, "arrange", wrong)
    with pytest.raises(
        ValueError, match=r"logits of PyTorch and JAX differ by .* nothing was written: verify=false writes"
    ) as caught:
        run_convert(published, tmp_path / "out", to_format=to_format)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]
    assert run_convert(published, tmp_path / "out", to_format=to_format, verify=False)["largest_difference"] is None


@pytest.mark.parametrize("to_format", ["torch", "jax"])
def test_scores_that_disagree_are_not_written_though_logits_agree(published, tmp_path, monkeypatch, to_format):
    from sedd_jax.conversion import torch_model

    right = torch_model.SEDD.log_score
    # As a program does that forgets what it divides by.
    monkeypatch.setattr(torch_model.SEDD, "log_score", lambda self, z, x, sigma: right(self, z, x, sigma + 0.1))
    with pytest.raises(errors.UserError, match=r"log scores by 4\.7, of .* nothing was written"):
        run_convert(published, tmp_path / "out", to_format=to_format)


def test_without_torch_nothing_is_verified(published, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    with pytest.raises(errors.UserError, match="verify runs the network in PyTorch: pip install torch"):
        run_convert(published, tmp_path / "out", verify=True)
    result = run_convert(published, tmp_path / "out")
    assert "not verified: install torch" in convert.describe(result)


def test_what_was_not_to_be_verified_is_not_told_to_install_torch(tmp_path):
    result = run_convert(GOLDEN / "model_absorb_a", tmp_path / "out", to_format="torch", verify=False)
    assert convert.describe(result).splitlines()[1] == "not verified: as asked"


@pytest.mark.parametrize("to_format", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_is_named_in_one_line(small_disk, to_format):
    (small_disk / "filling").write_bytes(b"0" * 1_900_000)
    arguments = [f"--from={GOLDEN / 'model_absorb_a'}", f"--to={small_disk / 'out'}", f"--to_format={to_format}"]
    done = subprocess.run([sys.executable, "-m", "sedd_jax", "convert", *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert str(small_disk) in done.stderr
    assert "No space left" in done.stderr
    assert not (small_disk / "out").exists()


def test_a_disk_that_may_only_be_read_is_named_in_one_line(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert cli.main(["convert", f"--from={GOLDEN / 'model_absorb_a'}", f"--to={small_disk / 'out'}"]) == 1
    assert f"cannot write to {small_disk / 'out'} (Read-only file system)" in capsys.readouterr().err


def test_without_flatbuffers_the_score_function_is_refused(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flatbuffers" else find_spec(name))
    with pytest.raises(errors.UserError, match=r"to_format=stablehlo .*: pip install flatbuffers"):
        run_convert(GOLDEN / "model_absorb_a", tmp_path / "out", to_format="stablehlo")
    assert not list(tmp_path.iterdir())


WITHOUT = "import sys; sys.modules |= dict.fromkeys({names!r}.split()); "


def run_python(code, without, cwd):
    command = [sys.executable, "-c", WITHOUT.format(names=without) + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.slow
def test_safetensors_need_no_torch_and_pickles_say_that_they_do(published, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.ckpt")
    code = """
import importlib.util, pathlib
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
from sedd_jax.cli import main as cli
assert cli.main(["convert", "--from=published", "--to=run"]) == 0
assert cli.main(["convert", "--from=run", "--to=back"]) == 0
assert cli.main(["convert", "--from=x.ckpt", "--to=other"]) == 1
"""
    done = run_python(code, "torch", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "is a pickle, and reading it needs torch: pip install torch, or use safetensors"
    )
    np.testing.assert_equal(load(tmp_path / "back"), load(published))


def code_of(card, heading):
    return re.search(rf"## {heading}\n.*?```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spec"), [("absorb_a", "ids:26"), ("uniform_a", "text8")])
def test_the_card_shows_code_that_runs_with_torch_alone(tmp_path, name, spec):
    run_convert(GOLDEN / f"model_{name}", tmp_path / "out", to_format="torch", tokenizer=spec)
    code = code_of((tmp_path / "out" / "README.md").read_text(), "In PyTorch")
    done = run_python(f"\n{code}\nprint(tokens.shape)", "sedd_jax jax safetensors transformers", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    *text, shape = done.stdout.splitlines()
    assert shape == "torch.Size([2, 24])"
    if spec == "text8":
        assert re.fullmatch("[a-z ]{24}", text[0])


def test_the_score_function_runs_without_this_package(tmp_path, golden):
    result = run_convert(GOLDEN / "model_absorb_a", tmp_path / "out", to_format="stablehlo")
    assert result["largest_difference"] < 1e-5
    np.savez(tmp_path / "in.npz", **{name: golden("model_absorb_a_io.npz")[name] for name in ("x", "sigma")})
    example = (tmp_path / "out" / "example.py").read_text()
    assert code_of((tmp_path / "out" / "README.md").read_text(), "As StableHLO") == example
    assert len(example.splitlines()) <= 11
    more = """
given = np.load("../in.npz")
assert score.platforms == ("cpu", "cuda", "tpu")
np.save("../out.npy", score.call(tensors, given["x"].astype(np.int32), given["sigma"]))
"""
    done = run_python(f"\n{example}\n{more}", "sedd_jax torch", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(2, 24, 27) [")
    expected = golden("model_absorb_a_io.npz")["log_score"]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-5, atol=5e-6)
    # The directory has the published layout, too.
    np.testing.assert_equal(load(tmp_path / "out"), load(GOLDEN / "model_absorb_a"))


def test_what_the_published_program_does_not_know_is_refused(make_run, tmp_path):
    make_run(mlp_ratio=2)
    with pytest.raises(ValueError, match=r"has network\.mlp_ratio=2: the published layout supports only 4"):
        run_convert(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_is_a_run_already(make_run, tmp_path):
    make_run()
    with pytest.raises(ValueError, match=r"to_format=jax makes a run directory, and .*/run is one already: choose"):
        run_convert(tmp_path / "run", tmp_path / "out", to_format="jax")


def test_a_mask_inside_the_vocabulary_is_refused(make_run, tmp_path):
    (tmp_path / "pieces.txt").write_text("[UNK]\n[SEP]\n[MASK]\na")
    make_run(tokenizers.build(f"wordpiece:{tmp_path / 'pieces.txt'}", lambda: ()))
    with pytest.raises(ValueError, match="has its mask at id 2: the published layout supports only the last id"):
        run_convert(tmp_path / "run", tmp_path / "out")


def test_a_checkpoint_of_mdlm_becomes_a_run(tmp_path):
    model = torch_model.SEDD.from_pretrained(GOLDEN / "model_absorb_a")
    source = foreign.write_lightning(tmp_path / "x.ckpt", model, foreign.mdlm_config())
    result = run_convert(source, tmp_path / "run", weights="raw")
    assert result["largest_difference"] < 1e-5
    run = runs.load(tmp_path / "run")
    assert run.network.normalize
    # Scores at a mask are the distribution of x0 divided by e^sigma - 1, at any noise level.
    _, params = run.params("ema_params")
    xt, sigma = jnp.full((2, 24), 26), jnp.array([0.1, 3.0])
    features = networks.apply(networks.Model(run.network, params), xt, sigma)
    score = np.exp(score_heads.log_score(networks.Model(run.network, params), features, xt, sigma))[..., :26]
    predicted = score * np.expm1(np.asarray(sigma))[:, None, None]
    np.testing.assert_allclose(predicted[0], predicted[1], rtol=1e-4)
    with torch.inference_mode():
        z = model.output_layer.linear(model.features(torch.full((1, 24), 26), torch.zeros(1)))[..., :26]
    np.testing.assert_allclose(predicted[0], z.softmax(-1)[0], rtol=1e-4)


def test_tokens_of_an_unknown_order_are_asked_for(tmp_path):
    model = torch_model.SEDD.from_pretrained(GOLDEN / "model_absorb_a")
    config = foreign.mdlm_config(data={"tokenizer_name_or_path": "bert-base-uncased"})
    source = foreign.write_lightning(tmp_path / "x.ckpt", model, config)
    with pytest.raises(
        ValueError, match="with the tokenizer bert-base-uncased, and does not say which id is the mask: give tokenizer"
    ):
        run_convert(source, tmp_path / "run")
    run_convert(source, tmp_path / "run", tokenizer="ids:26")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": "best"}, "weights=best is unknown: choose one of ema, raw"),
        ({"dtype": "int8"}, "dtype=int8 is unknown: choose one of float32, bfloat16, float16"),
        ({"to_format": "onnx"}, "to_format=onnx is unknown: choose one of torch, jax, stablehlo"),
        (
            {"dtype": "bfloat16"},
            "dtype=bfloat16 is for PyTorch tensors, and a run directory holds float32: leave it out",
        ),
        ({"step": 3}, "step=3 selects a checkpoint of a run directory: give the file"),
        ({"source": pathlib.Path("nowhere/at/all")}, "from=nowhere/at/all does not exist"),
        ({"source": pathlib.Path("nowhere.ckpt")}, "from=nowhere.ckpt does not exist"),
        ({"directory": GOLDEN}, "exists and is not empty: use another to"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, given, message):
    arguments = {"source": GOLDEN / "model_absorb_a", "directory": tmp_path / "run"} | given
    with pytest.raises(ValueError, match=message):
        run_convert(**arguments)
    assert not list(tmp_path.iterdir())


def test_what_another_process_has_written_meanwhile_stays(published, tmp_path, monkeypatch):
    config, read, written = tmp_path / "run" / "config.json", convert._read, []

    def slow_read(*given):
        monkeypatch.setattr(convert, "_read", read)
        run_convert(published, tmp_path / "run", verify=False)
        written.append(config.stat())
        return read(*given)

    monkeypatch.setattr(convert, "_read", slow_read)
    with pytest.raises(errors.UserError, match="exists and is not empty: use another to"):
        run_convert(published, tmp_path / "run", verify=False)
    assert written == [config.stat()]


@pytest.mark.parametrize("path", ["../outside.tiktoken", "/etc/passwd", "other.tiktoken", None])
def test_a_tokenizer_cannot_leave_the_directory(published, tmp_path, path):
    (tmp_path / "outside.tiktoken").write_text("")
    description = {"kind": "gpt2", "path": path, "sha256": "0" * 64}
    (published / "sedd_tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"but its own is gpt2\.tiktoken, beside it"):
        run_convert(published, tmp_path / "run")


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "morse"}', '{"kind": "ids"}', '{"kind": "ids", "size": 3}'])
def test_a_broken_tokenizer_is_named(published, tmp_path, text):
    (published / "sedd_tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"sedd_tokenizer\.json is damaged|kind='morse' is unknown"):
        run_convert(published, tmp_path / "run")
