"""Carrying checkpoints between run directories, the published PyTorch layouts and StableHLO."""

import dataclasses
import importlib.util
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.conversion import (
    model_cards,
    published_checkpoints,
    published_configs,
    score_export,
    torch_weights,
    verification,
)
from sedd_jax.data import subwords, tokenizers
from sedd_jax.model import networks, optimizers, train_state
from sedd_jax.runtime import errors, hosts, storage

FORMATS = ("torch", "jax", "stablehlo")
WEIGHTS = {"ema": "ema_params", "raw": "params"}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What is carried.

    Attributes:
        run: config, tokenizer and, as its directory, where it comes from.
        tensors: the network's, in the published names and layouts, float32.
        origin: facts about where it comes from.
        is_conditioned: whether the tensors are of a network that is told the noise.
    """

    run: runs.Run
    tensors: dict[str, np.ndarray]
    origin: dict[str, Any]
    is_conditioned: bool = True

    @property
    def num_parameters(self) -> int:
        return sum(tensor.size for name, tensor in self.tensors.items() if name != torch_weights.ROTARY)


def convert(
    source: storage.Directory,
    target: storage.Directory,
    *,
    to_format: str | None = None,
    weights: str = "ema",
    dtype: str = "float32",
    step: int | None = None,
    tokenizer: str = "",
    verify: bool | None = None,
) -> dict[str, Any]:
    """Carries a network from one program's directory to another's, which appears whole or not at all.

    Args:
        source: a run directory, whatever `published_checkpoints` reads, or OWNER/NAME of the Hub.
        target: a directory that does not exist yet.
        to_format: torch (config.json and model.safetensors as the published program loads them, a model card, the
            network in PyTorch), stablehlo (that, and the score function), or jax (a run directory); the other side of
            the source if None.
        weights: ema or raw.
        dtype: of the tensors written, where they are not a run's.
        step: of a run directory's checkpoint; the newest if None.
        tokenizer: for a source that does not bring its own: a spec as in config.data.tokenizer.
        verify: whether the PyTorch network must agree with ours; where torch is installed if None.

    Returns:
        What was done: from, to, to_format, dtype, num_parameters, largest_difference and largest_logit (None where not
        verified), and what is known of the source: layout, weights, step, revision of this program.

    Raises:
        errors.UserError: where the source is none of these or damaged, the target's program has no such model, the two
            networks disagree, or torch is needed and not installed.
    """
    for field, place in (("from", source), ("to", target)):
        if not isinstance(place, pathlib.Path):
            raise errors.UserError(
                "is in a bucket", field=field, value=place, remedy="copy it, and give a local directory"
            )
    assert isinstance(source, pathlib.Path)
    assert isinstance(target, pathlib.Path)
    choices = {"weights": (weights, WEIGHTS), "dtype": (dtype, DTYPES), "to_format": (to_format, (None, *FORMATS))}
    for field, (value, known) in choices.items():
        if value not in known:
            raise errors.UserError(
                "is unknown", field=field, value=value, remedy=f"choose one of {', '.join(filter(None, known))}"
            )
    if target.exists():
        raise errors.UserError("exists", field="to", value=target, remedy=f"use another {errors.name('to')}")
    has_torch = importlib.util.find_spec("torch") is not None
    if verify and not has_torch:
        raise errors.UserError(
            "runs the network in PyTorch",
            field="verify",
            remedy=f"pip install torch, or give {errors.name('verify')}=false",
        )

    model, other_side = _read(source, weights, step, tokenizer)
    origin = {"from": str(source), **model.origin, "revision": hosts.revision()}
    model = dataclasses.replace(model, origin=origin)
    to_format = to_format or other_side
    if to_format == "jax" and other_side != "jax":
        raise errors.UserError(
            f"makes a run directory, and {source} is one already",
            field="to_format",
            value=to_format,
            remedy="choose torch or stablehlo",
        )
    if to_format == "jax" and dtype != "float32":
        raise errors.UserError(
            "is for tensors of PyTorch", field="dtype", value=dtype, remedy="a run directory holds float32"
        )
    compares = has_torch if verify is None else verify
    with storage.new_directory(target) as partial:
        if to_format == "jax":
            compared = _write_run(partial, model, compares)
        else:
            compared = _write_torch(partial, model, dtype, compares, with_stablehlo=to_format == "stablehlo")
    facts = {"to": str(target), "to_format": to_format, "dtype": dtype, "num_parameters": model.num_parameters}
    found = compared._asdict() if compared else dict.fromkeys(verification.Comparison._fields)
    return model.origin | facts | found


def describe(result: dict[str, Any]) -> str:
    """What `convert` did, in two lines."""
    step = f" of step {result['step']}" if "step" in result else ""
    lines = [
        f"wrote {result['to']}: {result['num_parameters']} parameters in {result['dtype']}, "
        f"{result.get('weights', 'the')} weights{step} of {result['from']}; the optimizer's state is not carried"
    ]
    if result["largest_difference"] is None:
        lines.append("not verified: install torch to compare with the network in PyTorch (--verify)")
    else:
        lines.append(
            f"verified: logits of PyTorch and JAX differ by at most {result['largest_difference']:.2g}, the largest is "
            f"{result['largest_logit']:.4g}"
        )
    return "\n".join(lines)


def _read(source: pathlib.Path, weights: str, step: int | None, spec: str) -> tuple[Model, str]:
    """What a source holds, and the format on its other side."""
    if not source.exists():
        if not published_checkpoints.is_hub_name(str(source)):
            raise errors.UserError("does not exist", field="from", value=source, remedy="correct the path")
        source = published_checkpoints.download(str(source))
    read = published_checkpoints.find_reader(source)
    if read is not None:
        if step is not None:
            raise errors.UserError(
                "is for run directories",
                field="step",
                value=step,
                remedy=f"name the file of that step in {source} instead",
            )
        return _from_checkpoint(read(source, weights), source, spec), "jax"
    if not (source / storage.CHECKPOINTS).exists():
        raise errors.UserError(
            "is no checkpoint",
            field="from",
            value=source,
            remedy="give a run directory, one with config.json and model.safetensors or pytorch_model.bin, one with "
            ".hydra/ and checkpoints-meta/, or a .pth or .ckpt file",
        )
    if spec:
        raise errors.UserError(
            f"has no use here, since the run directory {source} has its own",
            field="tokenizer",
            value=spec,
            remedy="leave it out",
        )
    run = runs.load(source)
    found, params = run.params(WEIGHTS[weights], step=step)
    origin = {"layout": "run directory", "weights": weights, "step": found}
    return Model(run=run, tensors=torch_weights.to_torch(params, run.network), origin=origin), "torch"


def _from_checkpoint(checkpoint: published_checkpoints.Checkpoint, source: pathlib.Path, spec: str) -> Model:
    tokenizer = _find_tokenizer(checkpoint, source, spec)
    data = dataclasses.replace(checkpoint.config.data, tokenizer=spec or tokenizer.to_json()["kind"])
    run = runs.Run(workdir=source, config=dataclasses.replace(checkpoint.config, data=data), tokenizer=tokenizer)
    if run.graph.vocab_size != checkpoint.num_tokens:
        raise errors.UserError(
            f"has {run.graph.vocab_size} tokens, the checkpoint {checkpoint.num_tokens}",
            field="tokenizer",
            value=spec or published_checkpoints.TOKENIZER,
            remedy="give the checkpoint's own",
        )
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in checkpoint.tensors.items()}
    tensors.setdefault(torch_weights.ROTARY, torch_weights.rotary(run.network))
    return Model(run=run, tensors=tensors, origin=checkpoint.origin, is_conditioned=checkpoint.is_conditioned)


def _find_tokenizer(
    checkpoint: published_checkpoints.Checkpoint, source: pathlib.Path, spec: str
) -> tokenizers.Tokenizer:
    """The tokenizer asked for, or the source's own, or GPT-2's where its size is that, or plain ids."""
    if not spec and (source / published_checkpoints.TOKENIZER).exists():
        return tokenizers.read(source / published_checkpoints.TOKENIZER)
    if not spec and checkpoint.tokenizer not in ("", "gpt2"):
        raise errors.UserError(
            f"{source} was trained on tokens of {checkpoint.tokenizer}, whose mask may be any of them",
            remedy=f"give {errors.name('tokenizer')}, such as wordpiece:vocab.txt",
        )
    usual = "gpt2" if checkpoint.num_tokens == tokenizers.VOCAB_SIZES["gpt2"] else f"ids:{checkpoint.num_tokens}"
    return tokenizers.build(spec or usual, lambda: iter(()))


def _write_run(directory: pathlib.Path, model: Model, compares: bool) -> verification.Comparison | None:
    run = model.run
    params = torch_weights.from_torch(_told_noise(model), run.network)
    state = train_state.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=params,
        opt_state=optimizers.make_optimizer(run.config.optimizer).init(params),
    )
    written = runs.fill(directory, run.config, run.tokenizer, state)
    runs.write_json(directory / "origin.json", model.origin)
    if not compares:
        return None
    theirs = verification.load(published_configs.to_sedd(run), model.tensors)
    return _agreeing(theirs, written.ema_params()[1], run, is_conditioned=model.is_conditioned)


def _write_torch(
    directory: pathlib.Path, model: Model, dtype: str, compares: bool, *, with_stablehlo: bool
) -> verification.Comparison | None:
    run = model.run
    published_configs.check_publishable(run)
    tensors = _rounded(_told_noise(model), dtype)
    origin = {**model.origin, "dtype": dtype, "config": configs.to_dict(run.config)}
    runs.write_json(directory / "config.json", published_configs.to_sedd(run) | {"sedd_jax": origin})
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes for the owner alone.
    (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)
    tokenizers.write(run.tokenizer, directory / published_checkpoints.TOKENIZER)
    if isinstance(run.tokenizer, subwords.SentencePiece):
        (directory / "tokenizer.model").write_bytes(run.tokenizer.file())
    shutil.copyfile(pathlib.Path(__file__).parent / "torch_model.py", directory / "torch_model.py")
    if with_stablehlo:
        exported = score_export.export(tensors, run.network, run.config.data.length)
        (directory / "score.stablehlo").write_bytes(exported)
        (directory / "example.py").write_text(model_cards.STABLEHLO_EXAMPLE, encoding="utf-8")
    card = model_cards.card(run, model.origin, model.num_parameters, dtype, with_stablehlo=with_stablehlo)
    (directory / "README.md").write_text(card, encoding="utf-8")
    if not compares:
        return None
    from sedd_jax.conversion import torch_model

    theirs = torch_model.SEDD.from_pretrained(directory)
    return _agreeing(theirs, torch_weights.from_torch(tensors, run.network), run)


def _agreeing(
    theirs: Any, params: networks.Params, run: runs.Run, *, is_conditioned: bool = True
) -> verification.Comparison:
    compared = verification.compare(theirs, params, run.network, run.config.data.length, is_conditioned=is_conditioned)
    if not compared.agrees:
        raise errors.UserError(
            f"logits of PyTorch and JAX differ by {compared.largest_difference:.2g} where the largest is "
            f"{compared.largest_logit:.4g}, so nothing was written",
            remedy=f"{errors.name('verify')}=false writes all the same",
        )
    return compared


def _told_noise(model: Model) -> dict[str, np.ndarray]:
    """Tensors of a network that may be told any noise level."""
    return model.tensors if model.is_conditioned else torch_weights.without_noise(model.tensors)


def _rounded(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Tensors in another dtype, but for the frequencies of rotary positions, which are no weights."""
    with np.errstate(over="ignore"):  # Which is told below, by its name.
        narrow = {
            name: x if name == torch_weights.ROTARY else x.astype(jnp.dtype(dtype)) for name, x in tensors.items()
        }
    for name, x in narrow.items():
        if not np.isfinite(x.astype(np.float32)).all():
            raise errors.UserError(
                f"cannot hold the values of {name}", field="dtype", value=dtype, remedy="use bfloat16 or float32"
            )
    return narrow
