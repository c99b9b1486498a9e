"""Readers for checkpoints of other programs: SEDD's, and those whose networks have the same architecture.

There are three layouts: a directory from the Hub, a run of the published program, and a checkpoint file of PyTorch
Lightning. Each is read into a `Checkpoint`. Nothing in the files is executed.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from sedd_jax import config as configs
from sedd_jax.conversion import other_programs, published_configs, torch_files, torch_weights
from sedd_jax.data import tokenizers
from sedd_jax.model import networks
from sedd_jax.runtime import errors

TOKENIZER = "sedd_tokenizer.json"  # Not tokenizer.json, which has another format on the Hub.
_PREFIX = "backbone."
_DOWNLOADED = ["config.json", "model*.safetensors*", "pytorch_model*.bin*", TOKENIZER, *tokenizers.FILES.values()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model read from the files of another program.

    Attributes:
        config: the other program's config, translated into ours.
        num_tokens: vocabulary size N, without the mask.
        tensors: weights, with the published names and layouts.
        origin: facts for the user: layout, which weights, step.
        tokenizer: name of the tokenizer in the other program; "" if it is not recorded.
        is_conditioned: whether the network receives the noise level; if not, it always receives sigma = 0.
        start_id: id that begins every sequence of an autoregressive model; None for a diffusion model.
    """

    config: configs.Config
    num_tokens: int
    tensors: dict[str, np.ndarray]
    origin: dict[str, Any]
    tokenizer: str = ""
    is_conditioned: bool = True
    start_id: int | None = None


def find_reader(source: pathlib.Path) -> Callable[[pathlib.Path, str], Checkpoint] | None:
    """The reader for the layout of a file or directory, or None if the layout is unknown.

    A reader takes the path and which weights to read, "ema" or "raw".

    Raises:
        errors.UserError: if the layout is of a program whose networks ours cannot express.
    """
    if source.suffix == ".ckpt":
        return read_lightning
    if source.suffix == ".pth" or _hydra(source).exists():
        return read_training
    if (source / "noise_schedule.pt").exists():
        raise other_programs.of_gidd(source)
    return read_hub if torch_files.has_weights(source) else None


def read_hub(source: pathlib.Path, weights: str) -> Checkpoint:
    """Reads a directory with config.json and weights, of SEDD or one of `other_programs`.

    Raises:
        errors.UserError: names what is missing, damaged or contradictory, or says that a file needs torch. The other
            readers raise it too.
    """
    if weights != "ema":
        raise errors.UserError(
            f"is not in {source}, which holds only one set of weights, usually the moving average",
            field="weights",
            value=weights,
            remedy=f"give {errors.name('weights')}=ema",
        )
    published = published_configs.read_json(source / "config.json")
    described, num_tokens = _described(published)
    tensors = torch_files.read_weights(source)
    origin = {"layout": f"Hub directory of {described.program}"}
    if num_tokens is None:
        tensors = _of_backbone(tensors)
        num_tokens = _num_tokens(described, tensors, source)
    return _checked(described, num_tokens, tensors, source, origin)


def read_training(source: pathlib.Path, weights: str) -> Checkpoint:
    """Reads a run directory of SEDD's program or RADD's, or one of its .pth files."""
    is_file = source.suffix == ".pth"
    root = source.absolute().parent.parent if is_file else source
    file = source if is_file else source / "checkpoints-meta" / "checkpoint.pth"
    for path in (_hydra(root), file):
        if not path.exists():
            raise errors.UserError(
                f"{path} is missing", remedy="give a run of the published program, with .hydra/ beside its checkpoints"
            )
    described, num_tokens = _with_tokens(published_configs.read_yaml(_hydra(root)))
    saved = published_configs.Fields(torch_files.read_pickle(file), file)
    tensors = torch_files.stored(saved["model"], file)
    _check_shapes(described, num_tokens, tensors, file)
    if weights == "ema":
        tensors |= _moving_average(saved["ema"], tensors, file)
    origin = {"layout": f"run of {described.program}", "weights": weights, "step": saved.whole_number("step")}
    return _checked(described, num_tokens, tensors, file, origin)


def read_lightning(source: pathlib.Path, weights: str) -> Checkpoint:
    """Reads a checkpoint file (.ckpt) of PyTorch Lightning, by MDLM's program or one that grew out of it."""
    saved = published_configs.Fields(torch_files.read_pickle(source), source)
    hyper_parameters = published_configs.Fields(saved["hyper_parameters"], source)
    described = other_programs.from_lightning(published_configs.Fields(hyper_parameters["config"], source))
    tensors = _of_backbone(torch_files.stored(saved["state_dict"], source))
    num_tokens = _num_tokens(described, tensors, source)
    _check_shapes(described, num_tokens, tensors, source)
    if weights == "ema":
        tensors |= _moving_average(saved["ema"], tensors, source)
    origin = {
        "layout": f"{described.program} checkpoint",
        "weights": weights,
        "step": saved.whole_number("global_step"),
    }
    return _checked(described, num_tokens, tensors, source, origin)


def download(name: str) -> pathlib.Path:
    """Downloads a model from the Hugging Face Hub by its id, OWNER/NAME, and returns its directory.

    Only the files that the readers use are fetched, into the Hub's own cache.

    Raises:
        errors.UserError: if the download fails, or huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise errors.UserError(
            f"{name} is not a local path, and the Hub needs a package", remedy="pip install huggingface_hub"
        ) from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_DOWNLOADED))
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise errors.UserError(
            f"{name} is not a local path, and the download from the Hub failed ({why})",
            remedy="give a local directory",
        ) from error


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of a model id on the Hub, OWNER/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def _described(published: published_configs.Fields) -> tuple[other_programs.Described, int | None]:
    """What config.json says, and the vocabulary size N; None if the tensors say that."""
    if other_programs.is_transformers(published):
        return other_programs.from_transformers(published), None
    return _with_tokens(published)


def _with_tokens(published: published_configs.Fields) -> tuple[other_programs.Described, int]:
    """What a config of SEDD's program or RADD's says, and the vocabulary size N."""
    num_tokens = published_configs.num_tokens(published)
    if other_programs.is_radd(published):
        return other_programs.from_radd(published), num_tokens
    return other_programs.Described(program="SEDD", config=published_configs.from_sedd(published)), num_tokens


def _of_backbone(tensors: dict[str, torch_files.Stored]) -> dict[str, torch_files.Stored]:
    """The tensors of a Lightning module's network, without their prefix. Others are of its metrics."""
    return {name.removeprefix(_PREFIX): x for name, x in tensors.items() if name.startswith(_PREFIX)}


def _num_tokens(
    described: other_programs.Described, tensors: dict[str, torch_files.Stored], source: pathlib.Path
) -> int:
    """Vocabulary size N of a network by its embedding, whose states include the mask if the graph has one."""
    shape = published_configs.Fields(tensors, source)["vocab_embed.embedding"].shape
    if len(shape) != 2 or shape[0] < 2:
        raise errors.UserError(f"{source} has an embedding of shape {shape}", remedy="give another file")
    return shape[0] - configs.graph_class(described.config.graph).has_mask


def _check_shapes(
    described: other_programs.Described,
    num_tokens: int,
    tensors: dict[str, torch_files.Stored],
    source: pathlib.Path,
) -> None:
    """Checks names and shapes of tensors against the network that a config describes."""
    try:
        found = {name: tensor.shape for name, tensor in tensors.items()}
        torch_weights.check_shapes(found, _network(described, num_tokens), described.layout)
    except errors.UserError as error:
        raise error.at(str(source)) from error


def _network(described: other_programs.Described, num_tokens: int) -> networks.NetworkConfig:
    graph = configs.graph_class(described.config.graph).from_tokenizer(num_tokens, None)
    return dataclasses.replace(described.config.network, num_states=graph.num_states)


def _checked(
    described: other_programs.Described,
    num_tokens: int,
    tensors: dict[str, torch_files.Stored],
    source: pathlib.Path,
    origin: dict[str, Any],
) -> Checkpoint:
    """A checkpoint, once its tensors are checked against the network that its config describes."""
    _check_shapes(described, num_tokens, tensors, source)
    arrays = torch_files.arrays(tensors)
    try:
        torch_weights.check_finite(arrays)
    except errors.UserError as error:
        raise error.at(str(source)) from error
    return Checkpoint(
        config=described.config,
        num_tokens=num_tokens,
        tensors=torch_weights.modulated(arrays, _network(described, num_tokens), described.layout),
        origin=origin,
        tokenizer=described.tokenizer,
        is_conditioned=described.is_conditioned,
        start_id=described.start_id(num_tokens, source),
    )


def _moving_average(
    saved: Any, tensors: dict[str, torch_files.Stored], path: pathlib.Path
) -> dict[str, torch_files.Stored]:
    """The moving average of parameters by name. It is saved as a list in their order, which is that of the tensors."""
    names = [name for name in tensors if name != torch_weights.ROTARY]
    values = published_configs.Fields(saved, path)["shadow_params"]
    if not isinstance(values, list) or len(values) != len(names):
        count = len(values) if isinstance(values, list) else type(values).__name__
        raise errors.UserError(
            f"{path} is damaged, with a moving average of {count} tensors for {len(names)} parameters",
            remedy="copy it again",
        )
    return torch_files.stored(dict(zip(names, values, strict=True)), path)


def _hydra(root: pathlib.Path) -> pathlib.Path:
    return root / ".hydra" / "config.yaml"
