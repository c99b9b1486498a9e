"""Files of PyTorch programs: every format is read, nothing in them is executed, and errors name the file."""

import collections
import json
import os
import pathlib
import pickle
import sys
import zipfile

import numpy as np
import pytest

omegaconf = pytest.importorskip("omegaconf", reason="OmegaConf is missing: pip install -e '.[test-all]'")
torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install -e '.[test-all]'")

import safetensors.numpy

from sedd_jax.conversion import published_configs, torch_files
from sedd_jax.runtime import errors

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.float32([1.5, -2])}


def tensors():
    return {name: torch.from_numpy(x) for name, x in ARRAYS.items()}


def check(stored):
    found = torch_files.arrays(stored)
    assert set(found) == set(ARRAYS)
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(found[name], x)
        assert found[name].dtype == np.float32


def write_parts(directory, ending, write):
    base = f"model.{ending}" if ending == "safetensors" else f"pytorch_model.{ending}"
    weight_map = {}
    for number, (name, x) in enumerate(ARRAYS.items()):
        part = base.replace(".", f"-0000{number}.")
        write({name: x}, directory / part)
        weight_map[name] = part
    (directory / f"{base}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save(state, path):
    torch.save({name: torch.from_numpy(x) for name, x in state.items()}, path)


@pytest.mark.parametrize(
    "write",
    [
        lambda directory: safetensors.numpy.save_file(ARRAYS, directory / "model.safetensors"),
        lambda directory: torch.save(tensors(), directory / "pytorch_model.bin"),
        lambda directory: torch.save(collections.OrderedDict(tensors()), directory / "pytorch_model.bin"),
        lambda directory: torch.save(tensors(), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False),
        lambda directory: torch.save(
            {name: torch.nn.Parameter(x) for name, x in tensors().items()}, directory / "pytorch_model.bin"
        ),
        lambda directory: torch.save({k: x.bfloat16() for k, x in tensors().items()}, directory / "pytorch_model.bin"),
        lambda directory: write_parts(directory, "safetensors", safetensors.numpy.save_file),
        lambda directory: write_parts(directory, "bin", save),
    ],
    ids=[
        "safetensors",
        "bin",
        "ordered",
        "before zip",
        "parameters",
        "bfloat16",
        "safetensors in parts",
        "bin in parts",
    ],
)
def test_every_form_is_read(tmp_path, write):
    assert not torch_files.has_weights(tmp_path)
    write(tmp_path)
    assert torch_files.has_weights(tmp_path)
    check(torch_files.read_weights(tmp_path))


class Runs:
    """An object whose unpickling calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("function", [os.system, exec, getattr, "".__class__.format, pathlib.Path.touch])
def test_a_pickle_that_would_run_code_does_not(tmp_path, function, as_zip):
    witness = tmp_path / "witness"
    arguments = {os.system: (f"touch {witness}",), exec: (f"open({str(witness)!r}, 'w')",)}.get(function, (witness,))
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": Runs(function, *arguments)}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ValueError, match=r"nothing of it was (loaded or )?run") as caught:
        torch_files.read_weights(tmp_path)
    assert "\n" not in str(caught.value)
    assert not witness.exists()


def test_a_byte_that_changed_is_damage_though_pytorch_reads_it(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.arange(1000, dtype=torch.float32)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(500, 510, dtype=np.float32).tobytes()) + 2] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["w"], torch.arange(1000.0))
    with pytest.raises(errors.UserError, match=r"x.pth is damaged: x/data/0 is not what was written: copy it again"):
        torch_files.read_pickle(path)


def test_compressed_members_are_not_read_as_if_they_were_not(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as whole, zipfile.ZipFile(tmp_path / "y.pth", "w") as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(errors.UserError, match=r"y.pth is damaged: x/\S+ is not what was written"):
        torch_files.read_pickle(tmp_path / "y.pth")


def test_libraries_in_a_pickle_stay_out_of_this_process(tmp_path):
    """Objects of a known library are replaced, so its functions are not called and it is not imported."""
    path = tmp_path / "x.ckpt"
    config = omegaconf.OmegaConf.create({"a": 1})
    torch.save({"config": config, "call": Runs(omegaconf._utils.get_list_element_type, list)}, path)
    before = set(sys.modules)
    found = torch_files.read_pickle(path)
    assert isinstance(found["config"], torch_files.Inert)
    assert set(sys.modules) == before


def test_a_config_is_read_from_inert_objects(tmp_path):
    content = {"a": 1, "b": {"c": [1, 2.5, None], "d": "x"}, "e": True}
    config = omegaconf.OmegaConf.create(content | {"f": "${b.d}"})
    torch.save({"config": config}, tmp_path / "x.ckpt")
    fields = published_configs.Fields(torch_files.read_pickle(tmp_path / "x.ckpt")["config"], tmp_path)
    assert [fields[name] for name in ("a", "b.d", "e", "f")] == [1, "x", True, "${b.d}"]
    assert fields.find("b.x") is fields.find("a.x") is fields.find("x") is published_configs.MISSING


def truncated(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [0, 10, 300, -100])
def test_truncated_pickles_are_named(tmp_path, keep):
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), path)
    truncated(path, keep)
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read .* copy it again") as caught:
        torch_files.read_weights(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_truncated_safetensors_are_named(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(ARRAYS, path)
    truncated(path, keep)
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read as safetensors .*: copy it again"):
        torch_files.read_weights(tmp_path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"<html>404</html>"), "cannot be read as tensors alone"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "cannot be read as tensors alone"),
        (lambda path: torch.save([torch.ones(1)], path), "holds no state_dict"),
        (lambda path: torch.save({"a": {"b": torch.ones(1)}}, path), "holds no state_dict"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("x", "y"), "cannot be read as a PyTorch file"),
    ],
)
def test_other_files_are_named(tmp_path, write, message):
    write(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        torch_files.read_weights(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", 3])
def test_an_index_cannot_leave_the_directory(tmp_path, name):
    directory = tmp_path / "model"
    directory.mkdir()
    safetensors.numpy.save_file(ARRAYS, tmp_path / "outside.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="not a file in its directory, so nothing was read"):
        torch_files.read_weights(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not an index"),
        ("[]", "is not an index"),
        ("{}", "is not an index"),
        ('{"weight_map": {"a": "b"}}', "b, which is missing"),
    ],
)
def test_a_broken_index_is_named(tmp_path, content, message):
    (tmp_path / "pytorch_model.bin.index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        torch_files.read_weights(tmp_path)


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has none of model.safetensors, pytorch_model.bin"):
        torch_files.read_weights(tmp_path)
