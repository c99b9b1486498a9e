"""A written checkpoint in transformers: a process without this package loads it, scores, samples and saves it."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install -e '.[test-all]'")
transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install -e '.[test-all]'")

from sedd_jax import runs
from sedd_jax.conversion import convert, published_configs, torch_model, verification
from sedd_jax.data import alphabets, subwords, tokenizers
from tests.support import goldens, places

MODELS = ("absorb_a", "uniform_a")
_OPEN = """
import sys
sys.modules |= dict.fromkeys(["sedd_jax", "jax"])
import numpy as np, torch
from transformers import AutoConfig, AutoModel
open_model = lambda name, **settings: AutoModel.from_pretrained(name, trust_remote_code=True, **settings)
"""


def write(name, directory, **options):
    target = convert.Target(directory=directory, to_format="torch", dtype=options.pop("dtype", "float32"))
    convert.convert(places.GOLDEN / f"model_{name}", target, verify=False, **options)
    return directory


def run_alone(code, directory):
    """What a process prints that has torch and transformers, neither this package nor JAX, and no network."""
    place = {"HF_HOME": str(directory / "hub"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | place
    command = [sys.executable, "-W", "error::UserWarning", "-c", _OPEN + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_transformers_alone_gives_the_scores_samples_and_text_and_saves_them(name, tmp_path, golden):
    write(name, tmp_path / "out", tokenizer="ids:26" if name == "absorb_a" else "text8")
    recorded = golden(f"model_{name}_io.npz")
    np.savez(tmp_path / "in.npz", x=recorded["x"], sigma=recorded["sigma"])
    code = """
given = np.load("in.npz")
x, sigma = torch.from_numpy(given["x"]).long(), torch.from_numpy(given["sigma"])
model = open_model("out")
model.save_pretrained("saved")
for name in ("out", "saved"):
    model = open_model(name)
    with torch.inference_mode():
        np.save(name + ".npy", model(x, sigma).numpy())
    tokens = model.sample(2, num_steps=3, sampler="euler", seed=5)
    np.save(name + "_tokens.npy", tokens.numpy())
    print(*model.decode(tokens), sep="|")
"""
    card = (tmp_path / "out" / "README.md").read_text()
    shown = re.search(r"## In transformers\n.*?```python\n(.*?)```", card, re.DOTALL)[1]
    *texts, text = run_alone(f"{code}\nimport os\nos.chdir('out')\n{shown}", tmp_path).splitlines()
    expected = torch_model.SEDD.from_pretrained(tmp_path / "out").sample(2, num_steps=3, sampler="euler", seed=5)
    tokenizer = tokenizers.read(tmp_path / "out" / "sedd_tokenizer.json")
    for place in ("out", "saved"):
        np.testing.assert_allclose(np.load(tmp_path / f"{place}.npy"), recorded["log_score"], rtol=1e-5, atol=5e-6)
        np.testing.assert_array_equal(np.load(tmp_path / f"{place}_tokens.npy"), expected)
    assert texts == ["|".join(tokenizer.decode(row) for row in expected.numpy())] * 2
    sampled = torch_model.SEDD.from_pretrained(tmp_path / "out").sample(2, num_steps=128, seed=0)
    assert text == tokenizer.decode(sampled[0].numpy())
    # What transformers has saved is a checkpoint like any other, for torch alone and for us.
    convert.convert(tmp_path / "saved", convert.Target(directory=tmp_path / "run"), verify=True)
    saved = torch_model.SEDD.from_pretrained(tmp_path / "saved").state_dict()
    for tensor, value in torch_model.SEDD.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(saved[tensor], value), tensor
    assert runs.load(tmp_path / "run").tokenizer == tokenizer


@pytest.fixture
def written(tmp_path):
    return write("absorb_a", tmp_path / "out", dtype="bfloat16")


@pytest.fixture(scope="module", autouse=True)
def place_of_code(tmp_path_factory):
    """Where transformers imports the code of checkpoints from, other than the user's own place."""
    place = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
        yield
    sys.path[:] = [path for path in sys.path if path != place]


def open_written(directory, **settings):
    return transformers.AutoModel.from_pretrained(directory, trust_remote_code=True, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_network_in_jax(name, tmp_path):
    model = open_written(write(name, tmp_path / "out"))
    config, _, params = goldens.model(name)
    compared = verification.compare(model, params, config, length=24)
    assert compared.agrees, compared


def test_weights_stay_float32_whatever_is_stored_and_asked_for(written, golden):
    recorded = golden("model_absorb_a_io.npz")
    x, sigma = torch.from_numpy(recorded["x"]).long(), torch.from_numpy(recorded["sigma"])
    alone = torch_model.SEDD.from_pretrained(written)
    for dtype in (torch.float32, torch.bfloat16):
        model = open_written(written, **({} if dtype == torch.float32 else {"dtype": dtype}))
        assert {parameter.dtype for parameter in model.state_dict().values()} == {torch.float32}
        alone.product_dtype = dtype
        with torch.inference_mode():
            assert torch.equal(model(x, sigma), alone(x, sigma))


def test_a_tensor_that_is_missing_is_an_error(written):
    tensors = torch_model.read_safetensors(written / "model.safetensors")
    tensors.pop("blocks.1.norm1.weight")
    from safetensors import torch as safetensors_torch

    safetensors_torch.save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"out lacks blocks\.1\.norm1\.weight: download or convert the model again"):
        open_written(written)


def test_new_weights_are_the_published_ones(written):
    config = transformers.AutoConfig.from_pretrained(written, trust_remote_code=True)
    make = lambda: transformers.AutoModel.from_config(config, trust_remote_code=True).state_dict()
    fresh = make()
    zero = {name for name, tensor in fresh.items() if not tensor.any()}
    assert zero == {name for name in fresh if "adaLN" in name or name.startswith("output_layer.linear")}
    torch.manual_seed(0)
    expected = torch_model.SEDD(json.loads((written / "config.json").read_text()))
    torch.manual_seed(0)
    for name, tensor in make().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_without_a_tokenizer_there_is_no_text(written):
    (written / "sedd_tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no sedd_tokenizer\.json was beside the weights: copy it there"):
        open_written(written).decode(torch.zeros(1, 3, dtype=torch.int64))


def _wordpiece(directory):
    pieces = ["[UNK]", "[SEP]", "ab", "##c", ".", "é", "[MASK]"]
    (directory / "pieces.txt").write_text("\n".join(pieces), encoding="utf-8")
    return tokenizers.build(f"wordpiece:{directory / 'pieces.txt'}", lambda: ())


def _gpt2(directory):
    ranks = {bytes([i]): i for i in range(256)} | {"né".encode(): 256}
    (directory / "ranks").write_bytes(subwords._file_of_ranks(ranks))
    return tokenizers.build(f"gpt2:{directory / 'ranks'}", lambda: ())


@pytest.mark.parametrize(
    "make",
    [
        lambda directory: alphabets.Characters(alphabet="a bé\n"),
        lambda directory: alphabets.Bytes(),
        lambda directory: alphabets.Ids(vocab_size=7),
        lambda directory: subwords.learn_sentence_piece(270, ["ab abc né\n"] * 50),
        _wordpiece,
        _gpt2,
        lambda directory: dataclasses.replace(_gpt2(directory), num_unused=2),
    ],
    ids=["characters", "bytes", "ids", "sentencepiece", "wordpiece", "gpt2", "gpt2 and unused ids"],
)
def test_text_is_what_our_tokenizer_gives(make, tmp_path, written):
    tokenizer = make(tmp_path)
    (written / "sedd_tokenizer.json").unlink()
    tokenizers.write(tokenizer, written / "sedd_tokenizer.json")
    ids = np.random.default_rng(0).integers(tokenizer.vocab_size, size=(3, 40))
    if tokenizer.eos_id is not None:
        ids[:, 7:9] = tokenizer.eos_id
    texts = open_written(written).decode(torch.from_numpy(ids))
    assert texts == [tokenizer.decode(row) for row in ids]


def test_the_published_program_is_given_the_config_that_it_knows(written):
    hub = pytest.importorskip("huggingface_hub")

    class Published(torch.nn.Module, hub.PyTorchModelHubMixin):
        """What the published program does: its own class with the whole config as a mapping."""

        def __init__(self, config):
            super().__init__()
            self.seen = config
            for name, child in torch_model.SEDD(config).named_children():
                self.add_module(name, child)

    loaded = Published.from_pretrained(written)
    assert loaded.seen == json.loads((written / "config.json").read_text())
    assert published_configs.FOR_TRANSFORMERS.items() <= loaded.seen.items()
    for name, tensor in torch_model.SEDD.from_pretrained(written).state_dict().items():
        assert torch.equal(loaded.state_dict()[name].float(), tensor), name


def test_the_code_that_is_written_is_the_package_s(written):
    for name in convert.CODE:
        assert (written / name).read_text() == (places.PACKAGE / "conversion" / name).read_text()
