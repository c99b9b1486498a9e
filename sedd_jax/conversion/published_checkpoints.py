"""Checkpoints of other programs, read without running anything in them: SEDD's, and MDLM's, whose network is the same.

A directory of the Hub, a run of the published program, a checkpoint of MDLM's: each keeps its config and weights in
another place, and gives a `Checkpoint`.
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

TOKENIZER = "sedd_tokenizer.json"  # The Hub's tokenizer.json has another format.
_MDLM_PREFIX = "backbone."
_DOWNLOADED = ["config.json", "model*.safetensors*", "pytorch_model*.bin*", TOKENIZER, *tokenizers.FILES.values()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network on its way between programs.

    Attributes:
        config: in our terms.
        num_tokens: real tokens N.
        tensors: the network's, in the published names and layouts.
        origin: facts for the reader: layout, which weights, step.
        tokenizer: its name in the other program; "" where that does not say.
        is_conditioned: whether the network is told the noise; where it is not, sigma = 0 stands for any.
    """

    config: configs.Config
    num_tokens: int
    tensors: dict[str, np.ndarray]
    origin: dict[str, Any]
    tokenizer: str = ""
    is_conditioned: bool = True


def find_reader(source: pathlib.Path) -> Callable[[pathlib.Path, str], Checkpoint] | None:
    """What reads a file or directory (given it, and "ema" or "raw"), by its layout; None where it has none of these."""
    if source.suffix == ".ckpt":
        return read_lightning
    if source.suffix == ".pth" or _hydra(source).exists():
        return read_training
    return read_hub if torch_files.has_weights(source) else None


def read_hub(source: pathlib.Path, weights: str) -> Checkpoint:
    """A directory with config.json and weights: SEDD's, or MDLM's where its model_type is mdlm.

    Raises:
        errors.UserError: names what is missing (torch, where a file takes it), damaged or contradictory; so do the
            others.
    """
    if weights != "ema":
        raise errors.UserError(
            f"is not in {source}, which holds one set of weights, as a rule the moving average",
            field="weights",
            value=weights,
            remedy=f"give {errors.name('weights')}=ema",
        )
    file = source / "config.json"
    published = published_configs.read_json(file)
    origin = {"layout": "Hub directory"}
    if published.get("model_type") != "mdlm":
        config, num_tokens = published_configs.from_sedd(published, file)
        return _checked(config, num_tokens, torch_files.read_weights(source), source, origin)
    config = published_configs.from_mdlm_transformers(published, file)
    is_conditioned = published_configs.Fields(published, file).choice("time_conditioning", True, False)
    return _mdlm(config, torch_files.read_weights(source), is_conditioned, source, origin)


def read_training(source: pathlib.Path, weights: str) -> Checkpoint:
    """A run of the published program, or one of its .pth files, whose EMA is a list in the order of the parameters."""
    is_file = source.suffix == ".pth"
    root = source.absolute().parent.parent if is_file else source
    file = source if is_file else source / "checkpoints-meta" / "checkpoint.pth"
    for path in (_hydra(root), file):
        if not path.exists():
            raise errors.UserError(
                f"{path} is missing", remedy="a run of the published program has .hydra/ beside its checkpoints"
            )
    config, num_tokens = published_configs.from_sedd(published_configs.read_yaml(_hydra(root)), _hydra(root))
    saved = published_configs.Fields(torch_files.read_pickle(file), file)
    tensors = torch_files.to_arrays(saved["model"], file)
    if weights == "ema":
        tensors |= _moving_average(saved["ema"], config, file)
    origin = {"layout": "run of the published program", "weights": weights, "step": saved.whole_number("step")}
    return _checked(config, num_tokens, tensors, file, origin)


def read_lightning(source: pathlib.Path, weights: str) -> Checkpoint:
    """A checkpoint of MDLM's program."""
    saved = published_configs.Fields(torch_files.read_pickle(source), source)
    hyper_parameters = published_configs.Fields(saved["hyper_parameters"], source)
    published = torch_files.plain(hyper_parameters["config"])
    config = published_configs.from_mdlm(published, source)
    fields = published_configs.Fields(published, source)
    tensors = torch_files.to_arrays(saved["state_dict"], source)
    if weights == "ema":
        average = _moving_average(saved["ema"], config, source)
        tensors |= {_MDLM_PREFIX + name: tensor for name, tensor in average.items()}
    origin = {"layout": "MDLM checkpoint", "weights": weights, "step": saved.whole_number("global_step")}
    is_conditioned = fields.choice("time_conditioning", True, False)
    name = published_configs.Fields(fields["data"], source)["tokenizer_name_or_path"]
    return dataclasses.replace(_mdlm(config, tensors, is_conditioned, source, origin), tokenizer=name)


def download(name: str) -> pathlib.Path:
    """A model of the Hugging Face Hub by its id, OWNER/NAME, into the Hub's own cache; only the files that are read.

    Raises:
        errors.UserError: where it cannot be had, or huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise errors.UserError(
            f"{name} is not here, and the Hub needs a package", remedy="pip install huggingface_hub"
        ) from error
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=_DOWNLOADED))
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise errors.UserError(
            f"{name} is not here, and the Hub did not give it ({why})", remedy="give a local directory"
        ) from error


def is_hub_name(name: str) -> bool:
    """Whether a name may be that of a model on the Hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def _mdlm(
    config: configs.Config,
    tensors: dict[str, np.ndarray],
    is_conditioned: bool,
    source: pathlib.Path,
    origin: dict[str, Any],
) -> Checkpoint:
    """MDLM's network is one part of what its programs keep; one of its states is the mask."""
    own = {name.removeprefix(_MDLM_PREFIX): x for name, x in tensors.items() if name.startswith(_MDLM_PREFIX)}
    num_states = len(published_configs.Fields(own, source)["vocab_embed.embedding"])
    checkpoint = _checked(config, num_states - 1, own, source, origin)
    return dataclasses.replace(checkpoint, is_conditioned=is_conditioned)


def _checked(
    config: configs.Config,
    num_tokens: int,
    tensors: dict[str, np.ndarray],
    source: pathlib.Path,
    origin: dict[str, Any],
) -> Checkpoint:
    """A checkpoint whose tensors are those that its config means."""
    num_states = configs.make_graph(config.graph, num_tokens, None).num_states
    try:
        torch_weights.check(tensors, dataclasses.replace(config.network, num_states=num_states))
    except errors.UserError as error:
        raise error.at(str(source)) from error
    return Checkpoint(config=config, num_tokens=num_tokens, tensors=tensors, origin=origin)


def _moving_average(saved: Any, config: configs.Config, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The published EMA, a list without names, by the order of the model's parameters."""
    names = torch_weights.parameter_names(config.network.num_layers)
    values = published_configs.Fields(saved, path)["shadow_params"]
    if not isinstance(values, list) or len(values) != len(names):
        count = len(values) if isinstance(values, list) else type(values).__name__
        raise errors.UserError(
            f"{path} is damaged, with a moving average of {count} tensors for {len(names)} parameters",
            remedy="copy it again",
        )
    return torch_files.to_arrays(dict(zip(names, values, strict=True)), path)


def _hydra(root: pathlib.Path) -> pathlib.Path:
    return root / ".hydra" / "config.yaml"
