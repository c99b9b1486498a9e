"""Readers for tensor files of PyTorch programs. Nothing in the files is executed, and nothing is copied at first.

Readers return `Stored` tensors, whose names and shapes are compared with a config before `arrays` copies them.

A safetensors file needs no torch. A pickle is read by torch's `weights_only` loader. Training checkpoints also contain
objects of a few libraries (OmegaConf configs, tokenizers), which are replaced by `Inert` ones. Pickles with objects of
any other library are refused.
"""

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors

from sedd_jax.runtime import errors, storage

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Libraries whose objects may be replaced, and other names that their pickles refer to.
_LIBRARIES = ("omegaconf", "transformers", "tokenizers", "lightning", "pytorch_lightning", "torchmetrics")
_NAMES = (
    "typing.Any",
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ["dict", "list", "int", "str", "float", "bool"]),
)


# Dtypes of weights, as torch and as safetensors name them.
_DTYPES = ("float64", "float32", "float16", "bfloat16", "F64", "F32", "F16", "BF16")
_LONGEST_NAME = 255  # bytes of a file name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file, which is not copied yet.

    Attributes:
        path: the file, for messages.
        shape: its shape.
        dtype: its dtype as the file names it.
        read: makes the array. A tensor of another dtype than those of weights may have none.
    """

    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class Inert:
    """A stand-in for an object whose class is not loaded. It has the object's state and does nothing."""

    state: Any

    def __new__(cls, *args: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *args: Any):
        self.state = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_in(name: str) -> Callable[..., Any]:
    """What a pickle calls instead of a name. PyTorch puts items into nothing but a dict."""
    return _empty if name == "collections.defaultdict" else type(name.rpartition(".")[2], (Inert,), {})


def _empty(*_: Any) -> dict[Any, Any]:
    return {}


def has_weights(directory: pathlib.Path) -> bool:
    """Whether a directory has weights under a file name that the Hub uses, in one file or in parts with an index."""
    return any((directory / name).exists() or _index(directory, name).exists() for name in WEIGHTS)


def read_weights(directory: pathlib.Path) -> dict[str, Stored]:
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


def arrays(tensors: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """The tensors as float32 NumPy arrays.

    Raises:
        errors.UserError: names a tensor that is not of floating-point numbers.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise errors.UserError(
                f"{tensor.path} has {name} in {tensor.dtype}", remedy="convert the weights to float32 or bfloat16 first"
            )
    return {name: tensor.read().astype(np.float32, copy=False) for name, tensor in tensors.items()}


def read_safetensors(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a safetensors file."""
    storage.check_regular(path)
    try:
        file = safetensors.safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping.
        return {
            name: Stored(
                path=path,
                shape=tuple(found.get_shape()),
                dtype=found.get_dtype(),
                read=lambda name=name: file.get_tensor(name),
            )
            for name, found in slices.items()
        }
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise errors.UserError(f"{path} cannot be read as safetensors ({error})", remedy="copy it again") from error


def read_pickled_tensors(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a state_dict that torch.save wrote."""
    return stored(read_pickle(path), path)


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

    storage.check_regular(path)
    try:
        is_zip = zipfile.is_zipfile(path)
        damaged = _damaged_members(path) if is_zip else []
        # PyTorch would unpack what is compressed, whatever its size.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip and not damaged else []
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
    inert: list[Any] = [(_stand_in(name), name) for name in names]
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


def stored(state: Any, path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a state_dict that was read from a file.

    Raises:
        errors.UserError: if it holds something else, or tensors whose values are not written one by one in the file.
    """
    import torch

    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise errors.UserError(
            f"{path} holds no state_dict, a mapping from names to tensors", remedy="give a file that does"
        )
    size = 0
    for name, tensor in state.items():
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_neg()
        if not is_plain or tensor.is_quantized or tensor.is_nested:
            raise errors.UserError(
                f"{path} has {name} as a sparse, quantized, nested, negated or meta tensor",
                remedy="save the weights as plain tensors",
            )
        size += tensor.numel() * tensor.element_size()
    # Two names may share a tensor, as embedding and head of some models do.
    if size > 2 * path.stat().st_size:
        raise errors.UserError(
            f"{path} has tensors of {size} bytes in {path.stat().st_size} bytes, so they repeat their values",
            remedy="save contiguous copies of them",
        )
    return {
        name: Stored(
            path=path,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            read=lambda tensor=tensor: tensor.detach().float().numpy(),
        )
        for name, tensor in state.items()
    }


def unwrapped(value: Any) -> Any:
    """The dict, list or value that an OmegaConf object stands for, if it is one. Interpolations stay strings."""
    if isinstance(value, Inert) and isinstance(value.state, Mapping):
        return value.state["_content"] if "_content" in value.state else value.state.get("_val")
    return value


def _index(directory: pathlib.Path, name: str) -> pathlib.Path:
    return directory / f"{name}.index.json"


def _parts(index: pathlib.Path) -> list[pathlib.Path]:
    """The files that an index lists, all of which must be in its directory."""
    try:
        content = json.loads(storage.read_description(index))
    except errors.UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise errors.UserError(
            f"{index} is not an index of weights ({_brief(error)})", remedy="copy it again"
        ) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise errors.UserError(f"{index} is not an index of weights (it has no weight_map)", remedy="copy it again")
    for name in weight_map.values():
        is_name = isinstance(name, str) and len(name) <= _LONGEST_NAME and "\0" not in name
        if not is_name or pathlib.PurePath(name).name != name or name in ("", ".."):
            raise errors.UserError(
                f"{index} names {str(name)[:_LONGEST_NAME]!r}, which is not a file in its directory, so nothing was "
                "read",
                remedy="copy it again",
            )
        if not (index.parent / name).exists():
            raise errors.UserError(f"{index} names {name}, which is missing", remedy="copy it again")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
