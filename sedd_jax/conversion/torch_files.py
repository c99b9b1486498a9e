"""Readers for tensor files of PyTorch programs. Nothing in the files is executed.

A safetensors file needs no torch. A pickle is read by torch's `weights_only` loader. Training checkpoints also contain
objects of a few libraries (OmegaConf configs, tokenizers), which are replaced by `Inert` ones. Pickles with objects of
any other library are refused.
"""

import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from sedd_jax.runtime import errors

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Libraries whose objects may be replaced, and other names that their pickles refer to.
_LIBRARIES = ("omegaconf", "transformers", "tokenizers", "lightning", "pytorch_lightning", "torchmetrics")
_NAMES = (
    "typing.Any",
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ["dict", "list", "int", "str", "float", "bool"]),
)


class Inert:
    """A stand-in for an object whose class is not loaded. It has the object's state and does nothing."""

    state: Any

    def __new__(cls, *args: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any):
        self.state = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def has_weights(directory: pathlib.Path) -> bool:
    """Whether a directory has weights under a file name that the Hub uses, in one file or in parts with an index."""
    return any((directory / name).exists() or _index(directory, name).exists() for name in WEIGHTS)


def read_weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, from model.safetensors or pytorch_model.bin, or from the parts that an index lists.

    Raises:
        errors.UserError: names the file that is missing, damaged or of another format, or that needs torch where torch
            is not installed.
    """
    for name in WEIGHTS:
        read = read_safetensors if name.endswith(".safetensors") else read_pickled_tensors
        if (directory / name).exists():
            return read(directory / name)
        if _index(directory, name).exists():
            return {key: value for part in _parts(_index(directory, name)) for key, value in read(part).items()}
    raise errors.UserError(f"{directory} has none of {', '.join(WEIGHTS)}", remedy="copy it again")


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file."""
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, TypeError) as error:
        raise errors.UserError(f"{path} cannot be read as safetensors ({error})", remedy="copy it again") from error


def read_pickled_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a state_dict that torch.save wrote."""
    return to_arrays(read_pickle(path), path)


def read_pickle(path: pathlib.Path) -> Any:
    """The content of a file that torch.save wrote: tensors, containers and `Inert` objects.

    Raises:
        errors.UserError: if the file is damaged, would run code or load more than tensors, or torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise errors.UserError(
            f"{path} is a pickle, and reading it needs torch", remedy="pip install torch, or use safetensors"
        ) from error

    try:
        is_zip = zipfile.is_zipfile(path)
        damaged = _damaged_members(path) if is_zip else []
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    except Exception as error:
        raise errors.UserError(
            f"{path} cannot be read as a PyTorch file ({_brief(error)})", remedy="copy it again"
        ) from error
    if damaged:
        raise errors.UserError(f"{path} is damaged: {damaged[0]} is not what was written", remedy="copy it again")
    foreign = [name for name in names if name not in _NAMES and name.partition(".")[0] not in _LIBRARIES]
    if foreign:
        raise errors.UserError(
            f"{path} is a pickle that refers to {', '.join(foreign[:3])}, so nothing of it was loaded or run",
            remedy="save the tensors alone",
        )
    inert: list[Any] = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        raise errors.UserError(
            f"{path} cannot be read as tensors alone ({_brief(error)}), and nothing of it was run",
            remedy="copy it again, or save the tensors alone",
        ) from error


def _damaged_members(path: pathlib.Path) -> list[str]:
    """Members of a ZIP archive whose bytes do not have their checksum, or that are compressed, as torch.save does not.

    PyTorch checks neither.
    """
    with zipfile.ZipFile(path) as archive:
        compressed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
        return compressed or [name for name in [archive.testzip()] if name]


def to_arrays(state: Any, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a state_dict as float32 NumPy arrays."""
    import torch

    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise errors.UserError(
            f"{path} holds no state_dict, a mapping from names to tensors", remedy="give a file that does"
        )
    return {name: tensor.detach().float().numpy() for name, tensor in state.items()}


def plain(value: Any) -> Any:
    """Dicts, lists and values of an OmegaConf config that was read as `Inert` objects; interpolations stay strings."""
    if isinstance(value, Inert) and isinstance(value.state, Mapping):
        state = value.state
        return plain(state["_content"]) if "_content" in state else plain(state.get("_val"))
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def _index(directory: pathlib.Path, name: str) -> pathlib.Path:
    return directory / f"{name}.index.json"


def _parts(index: pathlib.Path) -> list[pathlib.Path]:
    """The files that an index lists, all of which must be in its directory."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise errors.UserError(
            f"{index} is not an index of weights ({_brief(error)})", remedy="copy it again"
        ) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise errors.UserError(f"{index} is not an index of weights (it has no weight_map)", remedy="copy it again")
    for name in weight_map.values():
        if not isinstance(name, str) or pathlib.PurePath(name).name != name or name == "..":
            raise errors.UserError(
                f"{index} names {name!r}, which is not a file in its directory, so nothing was read",
                remedy="copy it again",
            )
        if not (index.parent / name).exists():
            raise errors.UserError(f"{index} names {name}, which is missing", remedy="copy it again")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
