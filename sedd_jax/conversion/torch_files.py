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
        ImportError: where it takes torch, which is not installed.
        ValueError: names the file that is missing, damaged or not what it should be.
    """
    for name in WEIGHTS:
        read = read_safetensors if name.endswith(".safetensors") else read_pickled_tensors
        if (directory / name).exists():
            return read(directory / name)
        if _index(directory, name).exists():
            return {key: value for part in _parts(_index(directory, name)) for key, value in read(part).items()}
    raise ValueError(f"{directory} has none of {', '.join(WEIGHTS)}: copy it again")


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file."""
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): copy it again") from error


def read_pickled_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file that torch.save wrote from a state_dict."""
    return to_arrays(read_pickle(path), path)


def read_pickle(path: pathlib.Path) -> Any:
    """What torch.save wrote: tensors, containers and `Inert` objects.

    Raises:
        ImportError: where torch is not installed.
        ValueError: where the file is damaged, or would run or load anything but tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a pickle, which takes torch to read: pip install torch, or use safetensors"
        ) from error

    try:
        is_zip = zipfile.is_zipfile(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a PyTorch file ({_brief(error)}): copy it again") from error
    foreign = [name for name in names if name not in _NAMES and name.partition(".")[0] not in _LIBRARIES]
    if foreign:
        raise ValueError(
            f"{path} is a pickle that asks for {', '.join(foreign[:3])}: nothing of it was loaded or run; save the "
            "tensors alone"
        )
    inert: list[Any] = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in names]
    try:
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone ({_brief(error)}): nothing of it was run; copy it again, or save "
            "the tensors alone"
        ) from error


def to_arrays(state: Any, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a state_dict as float32 arrays."""
    import torch

    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state_dict, a mapping from names to tensors: give one that does")
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
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weights ({_brief(error)}): copy it again") from error
    for name in names:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name or name == "..":
            raise ValueError(f"{index} names {name!r}, which is not a file beside it: nothing was read")
        if not (index.parent / name).exists():
            raise ValueError(f"{index} names {name}, which is missing: copy it again")
    return [index.parent / name for name in names]


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
