"""Files of tensors that PyTorch programs write, read without running anything that is in them.

safetensors needs no torch. Pickles are read by torch's `weights_only` loader; objects of a few libraries that training
states carry along (OmegaConf's configs, tokenizers) are replaced by `Inert` ones, and any other pickle is refused.
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
# Whose objects may be replaced, and names of other libraries that come with them.
_LIBRARIES = ("omegaconf", "transformers", "tokenizers", "lightning", "pytorch_lightning", "torchmetrics")
_NAMES = (
    "typing.Any",
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ["dict", "list", "int", "str", "float", "bool"]),
)


class Inert:
    """Stands for an object of a class that is not loaded: it has that object's state and does nothing."""

    state: Any

    def __new__(cls, *args: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any):
        self.state = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def has_weights(directory: pathlib.Path) -> bool:
    """Whether a directory holds weights in one of the files that the Hub knows, whole or in parts."""
    return any((directory / name).exists() or _index(directory, name).exists() for name in WEIGHTS)


def read_weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a directory: model.safetensors or pytorch_model.bin, or the parts that their index names.

    Raises:
        errors.UserError: names the file that is missing, damaged or not what it should be, or takes torch, which is
            not installed.
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
    """The tensors of a file that torch.save wrote from a state_dict."""
    return to_arrays(read_pickle(path), path)


def read_pickle(path: pathlib.Path) -> Any:
    """What torch.save wrote: tensors, containers and `Inert` objects.

    Raises:
        errors.UserError: where the file is damaged, would run or load anything but tensors, or torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise errors.UserError(
            f"{path} is a pickle, which takes torch to read", remedy="pip install torch, or use safetensors"
        ) from error

    try:
        is_zip = zipfile.is_zipfile(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    except Exception as error:
        raise errors.UserError(
            f"{path} cannot be read as a PyTorch file ({_brief(error)})", remedy="copy it again"
        ) from error
    foreign = [name for name in names if name not in _NAMES and name.partition(".")[0] not in _LIBRARIES]
    if foreign:
        raise errors.UserError(
            f"{path} is a pickle that asks for {', '.join(foreign[:3])}, so nothing of it was loaded or run",
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


def to_arrays(state: Any, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a state_dict as float32 arrays."""
    import torch

    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise errors.UserError(
            f"{path} holds no state_dict, a mapping from names to tensors", remedy="give one that does"
        )
    return {name: tensor.detach().float().numpy() for name, tensor in state.items()}


def plain(value: Any) -> Any:
    """An OmegaConf config that was read as `Inert` objects, as dicts, lists and values; interpolations are strings."""
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
    """The files that an index names, all of them beside it."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise errors.UserError(f"{index} is no index of weights ({_brief(error)})", remedy="copy it again") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise errors.UserError(f"{index} is no index of weights (it has no weight_map)", remedy="copy it again")
    for name in weight_map.values():
        if not isinstance(name, str) or pathlib.PurePath(name).name != name or name == "..":
            raise errors.UserError(
                f"{index} names {name!r}, which is not a file beside it: nothing was read", remedy="copy it again"
            )
        if not (index.parent / name).exists():
            raise errors.UserError(f"{index} names {name}, which is missing", remedy="copy it again")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
