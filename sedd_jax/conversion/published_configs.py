"""Translation of configs: from the published program to ours and back. `other_programs` has those of other programs."""

import contextlib
import itertools
import json
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.conversion import torch_files
from sedd_jax.runtime import errors, storage

MISSING = object()
_YAML_TAGS = [f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null")]
_TOO_LARGE = 2**31  # for a whole number of a config

# Our field -> theirs. Fields that a config may lack are in tables of their own.
NETWORK = {
    "data.length": "model.length",
    "network.hidden_size": "model.hidden_size",
    "network.num_layers": "model.n_blocks",
    "network.num_heads": "model.n_heads",
    "network.cond_dim": "model.cond_dim",
    "network.dropout": "model.dropout",
    "noise.name": "noise.type",
}
NOISE = {"noise.sigma_min": "noise.sigma_min", "noise.sigma_max": "noise.sigma_max"}
OPTIMIZER = {
    "optimizer.learning_rate": "optim.lr",
    "optimizer.beta1": "optim.beta1",
    "optimizer.beta2": "optim.beta2",
    "optimizer.eps": "optim.eps",
    "optimizer.weight_decay": "optim.weight_decay",
    "optimizer.ema_decay": "training.ema",
}
SEDD = {
    **NETWORK,
    **NOISE,
    **OPTIMIZER,
    "network.scale_by_sigma": "model.scale_by_sigma",
    "graph.name": "graph.type",
    "optimizer.warmup_steps": "optim.warmup",
    "optimizer.clip_norm": "optim.grad_clip",
    "training.batch_size": "training.batch_size",
    "training.num_micro_batches": "training.accum",
    "training.num_steps": "training.n_iters",
}
SEDD_OPTIONAL = {"noise.eps": "noise.eps"}
# graph.type of a run with `network.normalize` -> our fields. The published program has no such network, and refuses the
# config: it does not know these names, and model.scale_by_sigma is missing.
NORMALIZED: dict[str, dict[str, Any]] = {
    f"{graph}_normalized": {"graph.name": graph, "network.scale_by_sigma": is_scaled, "network.normalize": True}
    for graph, is_scaled in (("absorb", True), ("uniform", False))
}
NOTE = "graph.type: only torch_model.py and modeling_sedd.py of this directory, and sedd_jax, read this network"
# What transformers reads beside. It would take the dtype of stored weights for that of matrix products.
FOR_TRANSFORMERS = {
    "architectures": ["SEDDModel"],
    "auto_map": {"AutoConfig": "modeling_sedd.SEDDConfig", "AutoModel": "modeling_sedd.SEDDModel"},
    "dtype": "float32",
}


class Fields:
    """A mapping read from a file. Errors about its fields name the file.

    A name may lead into inner mappings, as in model.length. Only what is asked for is looked at: aliases in YAML and in
    pickles can make a small file stand for an endless mapping.
    """

    def __init__(self, content: Any, path: pathlib.Path):
        content = torch_files.unwrapped(content)
        if not isinstance(content, Mapping):
            raise errors.UserError(
                f"{path} holds a {type(content).__name__} where a mapping should be", remedy="give another file"
            )
        self._content, self.path = content, path

    def find(self, name: str) -> Any:
        """The value of a field; `MISSING` if there is none."""
        value: Any = self._content
        for part in [name] if name in self._content else name.split("."):
            value = torch_files.unwrapped(value[part]) if isinstance(value, Mapping) and part in value else MISSING
        return value

    def __getitem__(self, name: str) -> Any:
        found = self.find(name)
        if found is MISSING:
            known = ", ".join(brief(key) for key in itertools.islice(self._content, 6))
            raise errors.UserError(f"{self.path} has no {name!r}, only {known}", remedy="give another file")
        return found

    def choice(self, name: str, *known: str | bool) -> Any:
        """The value of a field, which must be one of those known."""
        value = self[name]
        if not isinstance(value, str | bool) or value not in known:
            raise errors.UserError(
                f"{self.path} has {name}={brief(value)}",
                remedy=f"only {' or '.join(map(repr, known))} can be converted",
            )
        return value

    def text(self, name: str) -> str:
        """The value of a field, which must be text."""
        value = self[name]
        if not isinstance(value, str):
            raise errors.UserError(f"{self.path} has {name}={brief(value)}", remedy="it must be text")
        return value

    def whole_number(self, name: str) -> int:
        """The value of a field, which must be a whole number of at least 0."""
        value = self[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _TOO_LARGE:
            raise errors.UserError(
                f"{self.path} has {name}={brief(value)}",
                remedy=f"it must be a whole number of at least 0 and below {_TOO_LARGE}",
            )
        return value


def from_sedd(published: Fields) -> configs.Config:
    """Our config from config.json or .hydra/config.yaml of the published program, or from config.json of `to_sedd`.

    Raises:
        errors.UserError: names the file and the field that is missing or impossible. The other functions raise it too.
    """
    kind = published.find("graph.type")
    fixed = NORMALIZED.get(kind, {}) if isinstance(kind, str) else {}
    required = {ours: name for ours, name in SEDD.items() if ours not in fixed}
    return translate(published, required, SEDD_OPTIONAL, fixed)


def num_tokens(published: Fields) -> int:
    """The vocabulary size N, without the mask, that the published program's config gives."""
    found = published.whole_number("tokens")
    if found == 0:
        raise errors.UserError(
            f"{published.path} has tokens=0", remedy="it must be the vocabulary size without the mask"
        )
    return found


def to_sedd(run: runs.Run) -> dict[str, Any]:
    """The content of config.json of the published program for a run of ours; it refuses that of `NORMALIZED`."""
    published: dict[str, Any] = {"model_type": "sedd", "ngpus": 1, "tokens": run.graph.vocab_size}
    flat = configs.flatten(configs.to_dict(run.config))
    for ours, path in (SEDD | SEDD_OPTIONAL).items():
        section, _, name = path.partition(".")
        published.setdefault(section, {})[name] = flat[ours]
    published["model"] |= {"name": "sedd_jax", "type": "ddit"}
    published["graph"] |= {"file": "data", "report_all": False}
    if run.network.normalize:
        published["graph"]["type"] += "_normalized"
        del published["model"]["scale_by_sigma"]
    if run.is_autoregressive:  # It is never published, but its network is compared with one in PyTorch.
        published["graph"]["type"] = "absorb"
    published["optim"]["optimizer"] = "AdamW"
    published["data"] = {"train": run.config.data.source, "valid": run.config.data.source, "cache_dir": "data"}
    published["sampling"] = {"predictor": "analytic", "steps": run.config.sampling.num_steps, "noise_removal": True}
    return published


def check_publishable(run: runs.Run) -> None:
    """Raises errors.UserError if neither the published program nor `torch_model` has a network like the run's."""
    if run.is_autoregressive:
        raise errors.UserError(
            f"{run.workdir} is an autoregressive run", remedy="the published layout supports only diffusion models"
        )
    if run.graph.has_mask and run.graph.mask_id != run.graph.num_states - 1:
        raise errors.UserError(
            f"{run.workdir} has its mask at id {run.tokenizer.mask_id}",
            remedy="the published layout supports only the last id",
        )
    if run.network.mlp_ratio != 4:
        raise errors.UserError(
            f"{run.workdir} has network.mlp_ratio={run.network.mlp_ratio}",
            remedy="the published layout supports only 4",
        )


def read_json(path: pathlib.Path) -> Fields:
    """Reads a config in JSON."""
    try:
        content = json.loads(storage.read_description(path))
    except FileNotFoundError as error:
        raise errors.UserError(
            f"{path} is missing", remedy="give a directory with this file beside the weights"
        ) from error
    except errors.UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"{path} is not JSON ({error})", remedy="copy it again") from error
    return Fields(content, path)


def read_yaml(path: pathlib.Path) -> Fields:
    """Reads a config in YAML, as Hydra writes it. Only values of names that its readers ask for are made."""
    import yaml

    try:
        root = yaml.compose(storage.read_description(path), Loader=yaml.SafeLoader)
    except errors.UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:120]
        raise errors.UserError(f"{path} is not YAML ({why})", remedy="copy it again") from error
    if not isinstance(root, yaml.MappingNode):
        return Fields([] if isinstance(root, yaml.SequenceNode) else root and root.value, path)
    constructor = yaml.constructor.SafeConstructor()
    content = {}
    for name in ("tokens", "model.type", *SEDD.values(), *SEDD_OPTIONAL.values()):
        node: Any = root
        for part in name.split("."):
            inner = reversed(node.value) if isinstance(node, yaml.MappingNode) else ()  # The last of equal keys counts.
            node = next((value for key, value in inner if key.value == part), None)
        if isinstance(node, yaml.ScalarNode):
            content[name] = node.value
            # A date, or 5000 digits, stays text, and is refused as such.
            with contextlib.suppress(ValueError, KeyError):
                if node.tag in _YAML_TAGS:
                    content[name] = constructor.construct_object(node)
        elif node is not None:
            content[name] = [node.id]
    return Fields(content, path)


def brief(value: Any) -> str:
    """A short form of a value of a foreign file, which may be of any size and depth."""
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float | str):
        return reprlib.repr(value)
    return f"a {type(value).__name__}"


def translate(
    published: Fields, required: Mapping[str, str], optional: Mapping[str, str], fixed: Mapping[str, Any]
) -> configs.Config:
    """Our config from another program's.

    Args:
        published: the other program's config.
        required: our field -> theirs, for fields that it must have.
        optional: the same for fields that it may lack; ours then keep their defaults.
        fixed: values of our fields that no field of theirs sets.
    """
    flat: dict[str, Any] = configs.flatten(configs.to_dict(configs.Config()))
    path = published.path
    for ours, name in {**required, **optional}.items():
        value = published.find(name)
        if value is not MISSING:
            is_single = value is None or isinstance(value, bool | int | float | str)
            flat[ours] = value = _as_number(value, type(flat[ours]))
            if not is_single or (isinstance(value, int) and abs(value) >= _TOO_LARGE):
                raise errors.UserError(
                    f"{path} has {name}={brief(value)}", remedy="give the config that the model was trained with"
                )
        elif ours in required:
            raise errors.UserError(f"{path} has no {name}", remedy="give the config of such a model")
    flat |= {**fixed, "data.source": "", "network.dtype": "float32"}
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, field = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[field] = value
    try:
        return configs.parse(nested)
    except errors.UserError as error:
        raise error.at(str(path)) from error


def _as_number(value: Any, kind: type) -> Any:
    """A value with the type of our field: YAML reads 1e-4 as text, and YAML and JSON may write 1.0 as 1."""
    if kind not in (int, float) or isinstance(value, bool):
        return value
    try:
        number = float(value)
        return kind(number) if number == kind(number) else value
    except (TypeError, ValueError, OverflowError):
        return value
