"""Checkpoints of strangers: whatever stands in a file, one line names it, and no size that it claims is believed."""

import copy
import functools
import json
import math
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install -e '.[test-all]'")

import safetensors.torch
import yaml

from sedd_jax.conversion import convert, torch_model, torch_weights
from sedd_jax.runtime import errors
from tests.support import foreign, goldens, places, wrong_values

GOLDEN = places.GOLDEN / "model_absorb_a"
DEEP = "[" * 50_000
VALUES = [
    None, True, 0, -1, 5, 2.5, math.nan, math.inf, 10**9, 10**12, 10**400, "", "text", "9" * 5000, "1e400", "\ud800",
    [], [5], {}, {"a": 5},
]  # fmt: skip
OTHER = ["", "[]", "null", "5", '"text"', "{", "\0\0\0", "\xff", DEEP, '{"a":' * 50_000, "9" * 5000, '{"a": 1e999}']


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Shapes of a network take a while to trace."""
    monkeypatch.setattr(torch_weights, "shapes", functools.cache(torch_weights.shapes))


@pytest.fixture
def hub(tmp_path):
    """A directory as the Hub has it."""
    directory = tmp_path / "hub"
    directory.mkdir()
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_bytes((GOLDEN / name).read_bytes())
    return directory


@pytest.fixture
def training(tmp_path):
    """A run directory of the published program."""
    root = tmp_path / "exp"
    (root / ".hydra").mkdir(parents=True)
    (root / "checkpoints-meta").mkdir()
    (root / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config()))
    model = torch_model.SEDD.from_pretrained(GOLDEN)
    saved = {"model": model.state_dict(), "ema": foreign.average(model), "step": 11}
    torch.save(saved, root / "checkpoints-meta" / "checkpoint.pth")
    return root


@pytest.fixture
def pickled(hub):
    """The same directory with pytorch_model.bin in place of safetensors; returns that file and its tensors."""
    (hub / "model.safetensors").unlink()
    return hub / "pytorch_model.bin", torch_model.SEDD.from_pretrained(GOLDEN).state_dict()


def config():
    return copy.deepcopy(goldens.load("model_absorb_a/config.json"))


def answer(source, named, weights="ema"):
    """The line that refuses a source, which names a file of it; None if it is converted."""
    try:
        convert._read(source, weights, None, "")
    except (errors.UserError, OSError) as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 3000
        assert named in message
        return message
    return None


@pytest.mark.slow
def test_whatever_stands_in_a_field_of_a_config(hub, training):
    """Every field in turn, in JSON and in YAML."""
    answers = []
    for source, path in ((hub, hub / "config.json"), (training, training / ".hydra" / "config.yaml")):
        assert answer(source, "") is None
        for one in wrong_values.changed(config(), VALUES):
            # YAML reads JSON, too, but for the half of a surrogate pair.
            text = json.dumps(one) if source == hub else yaml.safe_dump(one)
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            answers.append(answer(source, str(source)))
    assert 400 < sum(map(bool, answers)) < len(answers)


def test_whatever_stands_in_a_config(hub):
    path = hub / "config.json"
    for content in OTHER:
        path.write_text(content, encoding="latin-1")
        assert answer(hub, "config.json"), content[:50]
    for one in VALUES:
        path.write_text(json.dumps(config() | {"tokens": one}))
        assert answer(hub, str(hub)), one


@pytest.mark.parametrize("size", ["hidden_size", "cond_dim", "n_blocks", "length"])
def test_a_number_of_400_digits_is_no_size(hub, size):
    found = config()
    found["model"][size] = 10**400
    (hub / "config.json").write_text(json.dumps(found))
    assert f"config.json has model.{size}=a number of 1329 bits" in answer(hub, "config.json")


YAML = [
    "&x {y: *x}",
    "&x [*x]",
    "a: &x {y: *x}\nmodel: *x",
    "model: &x {length: *x}",
    "{a: " * 5000,
    "[" * 5000,
    "- " * 5000,
    "tokens: " + "9" * 5000,
    "tokens: 0x" + "9" * 5000,
    "tokens: " + "1:" * 4000 + "1",
    "tokens: 2024-99-99",
    "tokens: 2024-01-01",
    "tokens: !!python/object/apply:os.system [id]",
    "tokens: !!binary '*'",
    "tokens: !!int x",
    "tokens: !!bool x",
    "tokens: !!null x",
    "tokens: !!float x",
    "tokens: !!timestamp x",
    "!!set {tokens}",
    "tokens: *unknown",
    "? [a, b]\n: 3",
    "%YAML 3.0\n---\ntokens: 3",
    "--- a\n--- b",
    "\t",
]


@pytest.mark.slow
def test_whatever_stands_in_a_config_of_hydra(training):
    path = training / ".hydra" / "config.yaml"
    for content in (*OTHER, *YAML):
        path.write_text(content, encoding="latin-1")
        assert answer(training, "config.yaml"), content[:50]


def peak_memory(call):
    """Bytes that Python and NumPy held at most while a function ran."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_aliases_are_not_multiplied(training):
    """Six levels of nine aliases each stand for half a million values, also as merged keys."""
    path = training / ".hydra" / "config.yaml"
    lists = ["a0: &a0 {" + ", ".join(f"{name}: x" for name in "pqrstuvwz") + "}"]
    lists += [f"a{n}: &a{n} {{" + ", ".join(f"{name}: *a{n - 1}" for name in "pqrstuvwz") + "}" for n in range(1, 6)]
    merged = ["b0: &b0 {k: x}"]
    merged += [f"b{n}: &b{n} {{<<: [" + ", ".join([f"*b{n - 1}"] * 9) + "]}" for n in range(1, 7)]
    for bomb in (lists, merged):
        path.write_text("\n".join(bomb) + "\n" + yaml.safe_dump(config()))
        assert peak_memory(lambda: answer(training, "")) < 30e6
        assert answer(training, "") is None


@pytest.mark.parametrize("name", ["hub", "training"])
def test_a_config_of_a_million_layers_makes_none(name, request):
    source = request.getfixturevalue(name)
    found = config()
    found["model"]["n_blocks"] = 10**6
    (source / "config.json" if name == "hub" else source / ".hydra" / "config.yaml").write_text(json.dumps(found))
    assert peak_memory(lambda: answer(source, "missing ['blocks.")) < 30e6


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "sedd_tokenizer.json", "index", "part"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "zero", "loop"])
def test_only_files_with_an_end_are_opened(hub, file, kind):
    if file in ("index", "part"):
        (hub / "model.safetensors").rename(hub / "a.safetensors")
        index = hub / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
        file = index.name if file == "index" else "a.safetensors"
    replace(hub / file, kind)
    message = answer(hub, file if kind != "loop" else str(hub))
    # What leads nowhere is not there: a tokenizer need not be.
    assert message or (kind, file) == ("loop", "sedd_tokenizer.json")
    assert kind == "loop" or "not a file" in message


@pytest.mark.parametrize("file", [".hydra/config.yaml", "checkpoints-meta/checkpoint.pth"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "zero"])
def test_only_files_with_an_end_are_opened_of_a_run(training, file, kind):
    replace(training / file, kind)
    assert "not a file" in answer(training, file)


def replace(path, kind):
    path.unlink(missing_ok=True)
    make = {
        "pipe": os.mkfifo,
        "directory": os.mkdir,
        "zero": lambda path: os.symlink("/dev/zero", path),
        "loop": lambda path: os.symlink(path, path),
    }
    make[kind](path)


def test_a_description_without_end_is_not_read(hub):
    with open(hub / "config.json", "ab") as file:
        file.truncate(2**40)  # It takes no room on the disk.
    assert "more than the 67108864 of any description" in answer(hub, "config.json")


def test_whatever_stands_in_an_index(hub):
    (hub / "model.safetensors").unlink()
    index = hub / "model.safetensors.index.json"
    for name in ("", ".", "..", "/", "a" * 5000, "a/b", "a\0", "\ud800", "missing", 5, None, [], {}):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert len(answer(hub, f"{index.name} names ")) < 700, name
    for content in (*OTHER, '{"weight_map": []}', '{"weight_map": 5}'):
        index.write_text(content, encoding="latin-1")
        assert answer(hub, index.name), content[:50]


TOKENIZERS = [
    {"kind": "ids", "vocab_size": 9.0},
    {"kind": "ids", "vocab_size": "9"},
    {"kind": "ids", "vocab_size": True},
    {"kind": "ids", "vocab_size": 0},
    {"kind": "ids", "vocab_size": -5},
    {"kind": "ids", "vocab_size": 10**12},
    {"kind": "ids"},
    {"kind": "ids", "vocab_size": 26, "more": 1},
    {"kind": "sentencepiece", "model": 5},
    {"kind": "sentencepiece", "model": None},
    {"kind": "sentencepiece", "model": ""},
    {"kind": "sentencepiece", "model": "AAAA"},
    {"kind": "sentencepiece", "model": "é"},
    {"kind": "characters", "alphabet": 5},
    {"kind": "characters", "alphabet": list("abc")},
    {"kind": "characters", "alphabet": {"a": 1}},
    {"kind": "characters", "alphabet": "aa"},
    {"kind": "characters", "alphabet": "a\ud800"},
    {"kind": "characters", "alphabet": "\x1b" * 100_000},
    {"kind": "gpt2", "path": 5, "sha256": 5},
    {"kind": "gpt2", "path": "gpt2.tiktoken", "sha256": "0"},
    {"kind": "wordpiece", "path": "vocab.txt", "sha256": None},
    {"kind": None},
    {"kind": []},
    {"kind": "x" * 100_000},
    {"vocab_size": 9},
]


def test_whatever_stands_in_a_tokenizer(hub):
    for content in (*OTHER, *map(json.dumps, TOKENIZERS)):
        (hub / "sedd_tokenizer.json").write_text(content, encoding="latin-1")
        assert answer(hub, str(hub)), content[:50]


BIAS = "output_layer.linear.bias"


INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_are_floating_point_numbers(hub, pickled, file):
    write = safetensors.torch.save_file if file.endswith("s") else torch.save
    state = pickled[1]
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        write({name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}, hub / file)
        found, _ = convert._read(hub, "ema", None, "")
        np.testing.assert_array_equal(found.tensors[BIAS], state[BIAS].to(getattr(torch, dtype)).float())
        assert found.tensors[BIAS].dtype == np.float32
    for dtype in (*INTEGERS, "complex64", "float8_e4m3fn", "float8_e5m2"):
        write(state | {BIAS: state[BIAS].to(getattr(torch, dtype))}, hub / file)
        assert f"{file} has {BIAS} in " in answer(hub, file), dtype


def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore::UserWarning")  # about sparse and quantized tensors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to_sparse(), "as a sparse"),
        (lambda x: torch.eye(27).to_sparse_csr(), "as a sparse"),
        (lambda x: x.to("meta"), "meta tensor"),
        (quantized, "quantized"),
        (lambda x: torch.complex(x, x).conj().imag, "negated"),
        (lambda x: torch.full((), 1.0).expand(10**5, 4 * 10**4), "so they repeat their values"),
        (lambda x: torch.full((), 1.0, dtype=torch.float16).expand(10**5, 4 * 10**4), "so they repeat their values"),
        (lambda x: torch.full((), True).expand(10**9), "so they repeat their values"),
        (lambda x: torch.full((28,), 1.0), r"has shape (28,)"),
        (lambda x: torch.full((28,), 1), r"has shape (28,)"),
        (lambda x: torch.zeros(()), r"has shape ()"),
        (lambda x: torch.zeros(0), r"has shape (0,)"),
        (lambda x: torch.full((27,), math.nan), "not finite"),
        (lambda x: torch.full((27,), 1e300, dtype=torch.float64), "not finite"),
        (lambda x: 5, "no state_dict"),
        (lambda x: {"a": x}, "no state_dict"),
    ],
)
def test_whatever_a_pickle_has_for_a_tensor(hub, pickled, change, message):
    file, state = pickled
    torch.save(state | {BIAS: change(state[BIAS])}, file)
    assert message in answer(hub, str(hub))


def test_one_array_under_many_names_is_not_multiplied(hub):
    (hub / "model.safetensors").unlink()
    shared = torch.zeros(1000)
    torch.save({f"blocks.{i}.norm1.weight": shared for i in range(1000)}, hub / "pytorch_model.bin")
    assert "so they repeat their values" in answer(hub, "pytorch_model.bin")


def test_names_of_tensors_are_text(hub):
    (hub / "model.safetensors").unlink()
    for key in (5, ("a",), None, b"a"):
        torch.save({key: torch.ones(1)}, hub / "pytorch_model.bin")
        assert "no state_dict" in answer(hub, "pytorch_model.bin")


def header(content, data=b""):
    text = content.encode() if isinstance(content, str) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def test_whatever_stands_in_safetensors(hub):
    for content in [
        b"",
        b"\0" * 7,
        b"\xff" * 100,
        header(""),
        header(DEEP),
        header("{}"),
        header({"a": ONE}),
        header({"a": ONE | {"shape": [2**62, 2**62]}}, b"\0" * 4),
        header({"a": ONE | {"shape": [-1]}}, b"\0" * 4),
        header({"a": ONE | {"shape": 5}}, b"\0" * 4),
        header({"a": ONE | {"dtype": "F7"}}, b"\0" * 4),
        header({"a": ONE | {"dtype": 5}}, b"\0" * 4),
        header({"a": ONE | {"data_offsets": [0, 2**60]}}, b"\0" * 4),
        header({"a": ONE | {"data_offsets": [4, 0]}}, b"\0" * 4),
        header({"a": ONE, "b": ONE}, b"\0" * 4),
        header({"__metadata__": 5, "a": ONE}, b"\0" * 4),
        header({"\ud800": ONE}, b"\0" * 4),
        header({"x" * 100_000: ONE}, b"\0" * 4),
    ]:
        (hub / "model.safetensors").write_bytes(content)
        assert answer(hub, str(hub)), content[:100]


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_a_compressed_member_is_not_unpacked(training, member):
    """Three gigabytes of zeros take 13 MB when they are compressed. PyTorch never compresses."""
    path = training / "checkpoints-meta" / "checkpoint.pth"
    with zipfile.ZipFile(path) as whole:
        contents = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in contents.items():
            is_it = name.endswith(member)
            packed.writestr(name, b"\0" * 10**8 if is_it else content, zipfile.ZIP_DEFLATED if is_it else None)
    assert peak_memory(lambda: answer(training, "is damaged")) < 30e6
    assert member in answer(training, "checkpoint.pth is damaged")


def recursive():
    found = {}
    found["model"] = found
    return found


@pytest.mark.parametrize("name", ["step", "model", "ema"])
def test_whatever_stands_in_a_checkpoint(training, name):
    path = training / "checkpoints-meta" / "checkpoint.pth"
    saved = torch.load(path, weights_only=True)
    for value in [*VALUES, recursive(), torch.ones(2), {"shadow_params": recursive()}]:
        torch.save(saved | {name: value}, path)
        is_step = name == "step" and type(value) is int and 0 <= value < 2**31
        assert bool(answer(training, "checkpoint.pth")) != is_step, value


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["backbone", "time_conditioning", "data", "model", "hidden_size", "tokenizer_name_or_path"]
)
def test_whatever_stands_in_a_config_of_mdlm(tmp_path, name):
    model = torch_model.SEDD.from_pretrained(GOLDEN)
    for value in [*VALUES, recursive(), torch.ones(2)]:
        found = foreign.omegaconf.OmegaConf.to_container(foreign.mdlm_config())
        (found if name in found else found["data" if name in found["data"] else "model"])[name] = value
        message = answer(foreign.write_lightning(tmp_path / "x.ckpt", model, found), "x.ckpt", "raw")
        is_usual = (name, value is True) == ("time_conditioning", True) or (name, value) == (
            "tokenizer_name_or_path",
            "",
        )
        assert bool(message) != is_usual, value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("", "algo"),
        ("", "block_size"),
        ("", "noise"),
        ("algo", "name"),
        ("algo", "cross_attn"),
        ("algo", "time_conditioning"),
        ("noise", "type"),
        ("noise", "eps"),
        ("model", "length"),
    ],
)
@pytest.mark.parametrize("config", [foreign.duo_config("duo"), foreign.bd3lm_config("sedd")])
def test_whatever_stands_in_a_config_of_duo_or_bd3lm(tmp_path, config, section, name):
    """It is converted, or refused in one line that names the file: `answer` lets no other exception pass."""
    model = torch_model.SEDD.from_pretrained(GOLDEN)
    for value in [*VALUES, recursive(), torch.ones(2)]:
        found = foreign.omegaconf.OmegaConf.to_container(config)
        (found[section] if section else found)[name] = value
        answer(foreign.write_lightning(tmp_path / "x.ckpt", model, found), "x.ckpt", "raw")


@pytest.mark.parametrize("name", ["model_type", "time_conditioning", "model_length", "causal", "adaln", "block_size"])
def test_whatever_stands_in_a_config_for_transformers(tmp_path, name):
    torch.save({"backbone.vocab_embed.embedding": torch.ones(27, 64)}, tmp_path / "pytorch_model.bin")
    usual = {"block_size": 24, "cross_attn": False, "causal": False, "adaln": True}
    for value in [5, 2.5, 10**12, -1, "", "text", [], {"a": 5}, None, True]:
        config = foreign.transformers_config("bd3lm", 27, **usual) | {name: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert answer(tmp_path, str(tmp_path)), value
