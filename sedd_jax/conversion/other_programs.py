"""What configs of other programs say of their networks, and which of these have SEDD's architecture.

MDLM, UDLM, BD3-LM and Duo write checkpoints of PyTorch Lightning and directories for transformers. RADD writes the
published program's layouts around a network that is not told the noise level. docs/conversion.md has the list.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sedd_jax import config as configs
from sedd_jax.conversion import published_configs, torch_weights
from sedd_jax.runtime import errors

Fields = published_configs.Fields

# What the output of a network is, in our fields.
_SCORE: dict[str, Any] = {"graph.name": "absorb", "network.scale_by_sigma": True, "network.normalize": False}
_CLEAN = _SCORE | {"network.normalize": True}  # the distribution of x0 given xt
_POSTERIOR: dict[str, Any] = {"graph.name": "uniform", "network.scale_by_sigma": False, "network.normalize": True}
_NEXT = _POSTERIOR | {"graph.name": configs.AUTOREGRESSIVE, "network.normalize": False}

_MDLM = {"sedd": _SCORE, "subs": _CLEAN, "ar": _NEXT}
_UDLM = {"d3pm": _POSTERIOR}
_BD3LM = {"sedd": _SCORE, "mdlm": _CLEAN, "ar": _NEXT}
_DUO = {"sedd": _SCORE, "mdlm": _CLEAN, "ar": _NEXT, "duo_base": _POSTERIOR, "duo": _POSTERIOR}
_DUO["distillation"] = _POSTERIOR
_WHY = {
    "d3pm": "whose network may predict the mask as a clean token",
    "bd3lm": "whose blocks attend to noised and to clean text under a mask of their own",
    "hf_dit": "a copy of a model of the Hub, so convert that one",
    "dimamba": "another architecture",
    "unet": "another architecture",
}
_LIGHTNING = {
    **published_configs.NOISE,
    **published_configs.OPTIMIZER,
    "optimizer.warmup_steps": "lr_scheduler.num_warmup_steps",
    "optimizer.clip_norm": "trainer.gradient_clip_val",
    "training.batch_size": "loader.global_batch_size",
    "training.num_steps": "trainer.max_steps",
}
_TRANSFORMERS = {
    "data.length": "model_length",
    "network.hidden_size": "hidden_dim",
    "network.num_layers": "n_blocks",
    "network.num_heads": "n_heads",
    "network.cond_dim": "cond_dim",
    "network.dropout": "dropout",
}
_RADD = {ours: name for ours, name in published_configs.NETWORK.items() if ours != "network.cond_dim"}
_RADD_OPTIONAL = {
    ours: name
    for ours, name in (published_configs.SEDD | published_configs.SEDD_OPTIONAL).items()
    if ours not in published_configs.NETWORK and ours not in _CLEAN
}
# The id that begins every sequence of an autoregressive model, by tokenizer; below 0 it counts from the last token.
_START_IDS = {"": -1, "gpt2": -1, "bert-base-uncased": 101}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """What a config of another program says.

    Attributes:
        program: the program that wrote it.
        config: its config, translated into ours.
        layout: which tensors the network has, as in `torch_weights`.
        tokenizer: name of its tokenizer; "" if it is not recorded.
        is_conditioned: whether the network receives the noise level; if not, it always receives sigma = 0.
    """

    program: str
    config: configs.Config
    layout: str = torch_weights.MODULATED
    tokenizer: str = ""
    is_conditioned: bool = True

    def start_id(self, num_tokens: int, source: Any) -> int | None:
        """Id of the token that begins every sequence of an autoregressive model; None for a diffusion model.

        Raises:
            errors.UserError: if the tokenizer's is not known.
        """
        if configs.is_diffusion(self.config):
            return None
        if self.tokenizer not in _START_IDS:
            raise errors.UserError(
                f"{source} is an autoregressive model of {self.program} with the tokenizer {self.tokenizer}, whose "
                "first token is unknown",
                remedy=f"only {' or '.join(filter(None, _START_IDS))} can be converted",
            )
        found = _START_IDS[self.tokenizer]
        return found if found >= 0 else num_tokens + found


def from_lightning(published: Fields) -> Described:
    """What the config in a Lightning checkpoint says. Four programs write them, each with fields of its own.

    Raises:
        errors.UserError: names the file, the program and the field that is missing, impossible, or of a network that
            ours cannot express. The other functions raise it too.
    """
    if published.find("algo") is published_configs.MISSING:
        return _from_mdlm(published)
    is_duo = published.find("algo.cross_attn") is published_configs.MISSING
    return _from_duo(published) if is_duo else _from_bd3lm(published)


def is_transformers(published: Fields) -> bool:
    """Whether config.json is of a model for transformers that `from_transformers` reads."""
    kind = published.find("model_type")
    return isinstance(kind, str) and kind.lower() in _HUB


def from_transformers(published: Fields) -> Described:
    """What config.json of a model for transformers says."""
    return _HUB[published.text("model_type").lower()](published)


def of_gidd(place: Any) -> errors.UserError:
    """The error for a checkpoint of GIDD."""
    return errors.UserError(
        f"{place} seems to be of GIDD, whose network is told the time instead of the noise level, and whose noise may "
        "mix masks with uniform tokens, so it cannot be converted",
        remedy="give a checkpoint of another program",
    )


def is_radd(published: Fields) -> bool:
    """Whether a config is RADD's: its network's type is that of SEDD's "without time"."""
    return published.find("model.type") == "ddit_wot"


def from_radd(published: Fields) -> Described:
    """What RADD's config says, in config.json or .hydra/config.yaml; its field `tokens` is N, as in SEDD's."""
    config = published_configs.translate(published, _RADD, _RADD_OPTIONAL, _CLEAN | {"network.cond_dim": 1})
    return Described(program="RADD", config=config, layout=torch_weights.BIASED)


def _from_mdlm(published: Fields) -> Described:
    is_uniform = published.find("diffusion") == "uniform"
    program = "UDLM" if is_uniform else "MDLM"
    _choose(published, program, "backbone", "dit", "ar")
    _choose(published, program, "diffusion", "absorbing_state", "uniform")
    guidance = published.find("training.guidance")
    if guidance is not None and guidance is not published_configs.MISSING:
        raise _refusal(published, "UDLM", "training.guidance", "only networks without class labels can be converted")
    outputs = _UDLM if is_uniform else _MDLM
    output = outputs[_choose(published, program, "parameterization", *outputs)]
    return _lightning(published, program, output, published.choice("time_conditioning", True, False))


def _from_duo(published: Fields) -> Described:
    output = _DUO[_choose(published, "Duo", "algo.name", *_DUO)]
    _choose(published, "Duo", "algo.backbone", "dit")
    _choose(published, "Duo", "noise.type", "log-linear")
    return _lightning(published, "Duo", output, published.choice("algo.time_conditioning", True, False))


def _from_bd3lm(published: Fields) -> Described:
    output = _BD3LM[_choose(published, "BD3-LM", "algo.name", *_BD3LM)]
    _choose(published, "BD3-LM", "algo.backbone", "dit")
    _choose(published, "BD3-LM", "algo.cross_attn", False)
    if output is not _NEXT:
        _check_blocks(published, published.whole_number("model.length"), "${model.length}")
    return _lightning(published, "BD3-LM", output, published.choice("algo.time_conditioning", True, False))


def _lightning(published: Fields, program: str, output: Mapping[str, Any], is_conditioned: bool) -> Described:
    """What a Lightning checkpoint says, once its program and the meaning of its output are known."""
    fixed, optional = dict(output), dict(_LIGHTNING)
    if program == "Duo":  # It has a name of its own for the schedule, and of these programs it alone reads eps.
        fixed["noise.name"] = "loglinear"
        # Its first version took 1e-3 whatever the config said, which was 0.
        eps = published.find("noise.eps")
        if not (isinstance(eps, int | float) and eps == 0):
            optional["noise.eps"] = "noise.eps"
    if output is _NEXT:
        # The first token of a sequence is an input only, and noise has no part in it.
        length = published.whole_number("model.length") - 1
        fixed |= {"network.cond_dim": 1, "data.length": length, "noise.name": "loglinear"}
        is_conditioned = True
    required = {ours: name for ours, name in published_configs.NETWORK.items() if ours not in fixed}
    return Described(
        program=program,
        config=published_configs.translate(published, required, optional, fixed),
        layout=torch_weights.PLAIN if output is _NEXT else torch_weights.MODULATED,
        tokenizer=published.text("data.tokenizer_name_or_path"),
        is_conditioned=is_conditioned,
    )


def _hub_mdlm(published: Fields) -> Described:
    config = published_configs.translate(published, _TRANSFORMERS, {}, _CLEAN)
    return Described(program="MDLM", config=config, is_conditioned=published.choice("time_conditioning", True, False))


def _hub_udlm(published: Fields) -> Described:
    _choose(published, "UDLM", "cfg", False)
    config = published_configs.translate(published, _TRANSFORMERS, {}, _POSTERIOR)
    return Described(program="UDLM", config=config, is_conditioned=published.choice("time_conditioning", True, False))


def _hub_duo(published: Fields) -> Described:
    _choose(published, "Duo", "causal", False)
    return Described(program="Duo", config=published_configs.translate(published, _TRANSFORMERS, {}, _POSTERIOR))


def _hub_bd3lm(published: Fields) -> Described:
    _choose(published, "BD3-LM", "cross_attn", False)
    is_conditioned = published.choice("time_conditioning", True, False)
    is_modulated = published.choice("adaln", True, False)
    # It does not say what the output is; of its program's models only SEDD is told the noise level.
    output = _NEXT if published.choice("causal", True, False) else _SCORE if is_conditioned else _CLEAN
    fixed, length = dict(output), published.whole_number("model_length")
    if output is _NEXT:
        fixed["data.length"] = length - 1
    else:
        _check_blocks(published, length)
    if not is_modulated:
        fixed["network.cond_dim"] = 1
    required = {ours: name for ours, name in _TRANSFORMERS.items() if ours not in fixed}
    return Described(
        program="BD3-LM",
        config=published_configs.translate(published, required, {}, fixed),
        layout=torch_weights.MODULATED if is_modulated else torch_weights.PLAIN,
        is_conditioned=is_conditioned or not is_modulated,
    )


def _hub_gidd(published: Fields) -> Described:
    raise of_gidd(published.path)


_HUB = {"dit": _hub_gidd, "mdlm": _hub_mdlm, "udlm": _hub_udlm, "duo": _hub_duo, "bd3lm": _hub_bd3lm}


def _check_blocks(published: Fields, *length: int | str) -> None:
    """Raises an errors.UserError for a BD3-LM whose blocks are shorter than its sequences."""
    value = published.find("block_size")
    if not isinstance(value, int | str) or value not in length:
        raise _refusal(
            published, "BD3-LM", "block_size", f"only blocks of the whole length, {length[0]}, are converted"
        )


def _choose(published: Fields, program: str, name: str, *known: str | bool) -> Any:
    """The value of a field, which must be one of those known; the error says why another cannot be converted."""
    value = published[name]
    if isinstance(value, str | bool) and value in known:
        return value
    raise _refusal(published, program, name, f"only {' or '.join(map(repr, known))} can be converted")


def _refusal(published: Fields, program: str, name: str, remedy: str) -> errors.UserError:
    value = published.find(name)
    why = f", {_WHY[value]}" if isinstance(value, str) and value in _WHY else ""
    shown = published_configs.brief(value)
    return errors.UserError(f"{published.path} seems to be of {program}, but has {name}={shown}{why}", remedy=remedy)
