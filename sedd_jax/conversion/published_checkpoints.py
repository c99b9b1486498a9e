"""Readers for checkpoints of other programs: SEDD's and MDLM's, whose networks have the same architecture.

There are three layouts: a directory from the Hub, a run of the published program, and a checkpoint file of MDLM's
program. Each is read into a `Checkpoint`. Nothing in the files is executed.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from sedd_jax import config as configs
from sedd_jax.conversion import published_configs, torch_files, torch_weights
from sedd_jax.data import tokenizers
from sedd_jax.runtime import errors

TOKENIZER = "sedd_tokenizer.json"  # Not tokenizer.json, which has another format on the Hub.
_MDLM_PREFIX = "backbone."
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
    """

    config: configs.Config
    num_tokens: int
    tensors: dict[str, np.ndarray]
    origin: dict[str, Any]
    tokenizer: str = ""
    is_conditioned: bool = True


def find_reader(source: pathlib.Path) -> Callable[[pathlib.Path, str], Checkpoint] | None:
    """The reader for the layout of a file or directory, or None if the layout is unknown.

    A reader takes the path and which weights to read, "ema" or "raw".
    """
    if source.suffix == ".ckpt":
        return read_lightning
    if source.suffix == ".pth" or _hydra(source).exists():
        return read_training
    return read_hub if torch_files.has_weights(source) else None


def read_hub(source: pathlib.Path, weights: str) -> Checkpoint:
    """Reads a directory with config.json and weights: an MDLM model if its model_type is "mdlm", else a SEDD model.

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
    file = source / "config.json"
    published = published_configs.read_json(file)
    origin = {"layout": "Hub directory"}
    if published.find("model_type") != "mdlm":
        config, num_tokens = published_configs.from_sedd(published)
        return _checked(config, num_tokens, torch_files.read_weights(source), source, origin)
    config = published_configs.from_mdlm_transformers(published)
    is_conditioned = published.choice("time_conditioning", True, False)
    tensors = _of_backbone(torch_files.read_weights(source))
    checkpoint = _checked(config, _num_tokens(tensors, source), tensors, source, origin)
    return dataclasses.replace(checkpoint, is_conditioned=is_conditioned)


def read_training(source: pathlib.Path, weights: str) -> Checkpoint:
    """Reads a run directory of the published program, or one of its .pth files."""
    is_file = source.suffix == ".pth"
    root = source.absolute().parent.parent if is_file else source
    file = source if is_file else source / "checkpoints-meta" / "checkpoint.pth"
    for path in (_hydra(root), file):
        if not path.exists():
            raise errors.UserError(
                f"{path} is missing", remedy="give a run of the published program, with .hydra/ beside its checkpoints"
            )
    config, num_tokens = published_configs.from_sedd(published_configs.read_yaml(_hydra(root)))
    saved = published_configs.Fields(torch_files.read_pickle(file), file)
    tensors = torch_files.stored(saved["model"], file)
    _check_shapes(config, num_tokens, tensors, file)
    if weights == "ema":
        tensors |= _moving_average(saved["ema"], config, file)
    origin = {"layout": "run of the published program", "weights": weights, "step": saved.whole_number("step")}
    return _checked(config, num_tokens, tensors, file, origin)


def read_lightning(source: pathlib.Path, weights: str) -> Checkpoint:
    """Reads a checkpoint file (.ckpt) of MDLM's program, which uses PyTorch Lightning."""
    saved = published_configs.Fields(torch_files.read_pickle(source), source)
    hyper_parameters = published_configs.Fields(saved["hyper_parameters"], source)
    fields = published_configs.Fields(hyper_parameters["config"], source)
    config = published_configs.from_mdlm(fields)
    tensors = _of_backbone(torch_files.stored(saved["state_dict"], source))
    num_tokens = _num_tokens(tensors, source)
    _check_shapes(config, num_tokens, tensors, source)
    if weights == "ema":
        tensors |= _moving_average(saved["ema"], config, source)
    origin = {"layout": "MDLM checkpoint", "weights": weights, "step": saved.whole_number("global_step")}
    is_conditioned = fields.choice("time_conditioning", True, False)
    name = fields.text("data.tokenizer_name_or_path")
    checkpoint = _checked(config, num_tokens, tensors, source, origin)
    return dataclasses.replace(checkpoint, tokenizer=name, is_conditioned=is_conditioned)


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


def _of_backbone(tensors: dict[str, torch_files.Stored]) -> dict[str, torch_files.Stored]:
    """The tensors of MDLM's network, without their prefix. Others are of its metrics."""
    return {name.removeprefix(_MDLM_PREFIX): x for name, x in tensors.items() if name.startswith(_MDLM_PREFIX)}


def _num_tokens(tensors: dict[str, torch_files.Stored], source: pathlib.Path) -> int:
    """Vocabulary size N of MDLM's network, whose states include the mask."""
    shape = published_configs.Fields(tensors, source)["vocab_embed.embedding"].shape
    if len(shape) != 2 or shape[0] < 2:
        raise errors.UserError(f"{source} has an embedding of shape {shape}", remedy="give another file")
    return shape[0] - 1


def _check_shapes(
    config: configs.Config, num_tokens: int, tensors: dict[str, torch_files.Stored], source: pathlib.Path
) -> None:
    """Checks names and shapes of tensors against the network that a config describes."""
    num_states = configs.graph_class(config.graph).from_tokenizer(num_tokens, None).num_states
    try:
        found = {name: tensor.shape for name, tensor in tensors.items()}
        torch_weights.check_shapes(found, dataclasses.replace(config.network, num_states=num_states))
    except errors.UserError as error:
        raise error.at(str(source)) from error


def _checked(
    config: configs.Config,
    num_tokens: int,
    tensors: dict[str, torch_files.Stored],
    source: pathlib.Path,
    origin: dict[str, Any],
) -> Checkpoint:
    """A checkpoint, once its tensors are checked against the network that its config describes."""
    _check_shapes(config, num_tokens, tensors, source)
    arrays = torch_files.arrays(tensors)
    try:
        torch_weights.check_finite(arrays)
    except errors.UserError as error:
        raise error.at(str(source)) from error
    return Checkpoint(config=config, num_tokens=num_tokens, tensors=arrays, origin=origin)


def _moving_average(saved: Any, config: configs.Config, path: pathlib.Path) -> dict[str, torch_files.Stored]:
    """The EMA of the published program by name. It is saved as a list in the order of the model's parameters."""
    names = torch_weights.parameter_names(config.network.num_layers)
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
