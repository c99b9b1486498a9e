"""Conversion of checkpoints between run directories, the published PyTorch layouts and StableHLO."""

import dataclasses
import importlib.util
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.conversion import (
    measured,
    model_cards,
    published_checkpoints,
    published_configs,
    score_export,
    torch_weights,
    verification,
)
from sedd_jax.data import subwords, tokenizers
from sedd_jax.model import networks, optimizers, train_state
from sedd_jax.runtime import errors, hosts, leases, storage

FORMATS = ("torch", "jax", "stablehlo")
WEIGHTS = {"ema": "ema_params", "raw": "params"}
DTYPES = ("float32", "bfloat16", "float16")
CODE = ("torch_model.py", "modeling_sedd.py")  # the network for torch alone, and for transformers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a conversion writes.

    Attributes:
        directory: the directory to make; it must not exist yet.
        to_format: "torch" writes config.json and model.safetensors for the published program, a model card, and the
            network in PyTorch. "stablehlo" adds the score function. "jax" writes a run directory. None means "torch"
            for a run directory and "jax" for any other source.
        dtype: of the tensors in model.safetensors; a run directory always holds float32.
    """

    directory: storage.Directory
    to_format: str | None = None
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is being converted.

    Attributes:
        run: config and tokenizer; its `workdir` is the source.
        tensors: weights in float32, with the published names and layouts.
        origin: facts about the source, which are written beside the converted model.
        is_conditioned: whether the network receives the noise level.
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
    target: Target,
    *,
    weights: str = "ema",
    step: int | None = None,
    tokenizer: str = "",
    verify: bool | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint and writes it to a new directory, which appears complete or not at all.

    Args:
        source: a run directory, a path that `published_checkpoints` reads, or OWNER/NAME on the Hugging Face Hub.
        target: what to write, and where.
        weights: "ema" or "raw".
        step: which checkpoint of a run directory; the newest if None.
        tokenizer: a spec as in config.data.tokenizer. By default it is the source's own, or follows from the size of
            the vocabulary.
        verify: whether logits and log scores of the PyTorch network must match ours. None verifies if torch is
            installed.

    Returns:
        What was done: from, to, to_format, dtype, num_parameters, and the fields of `verification.Comparison` (None if
        not verified). Also facts about the source (layout, weights, step) and the revision of this program.

    Raises:
        errors.UserError: if the source is damaged or of no known layout, the target format cannot hold the model, the
            two networks disagree, or torch is needed but not installed.
    """
    directory, to_format, dtype = target.directory, target.to_format, target.dtype
    for field, place in (("from", source), ("to", directory)):
        if not isinstance(place, pathlib.Path):
            raise errors.UserError(
                "is in a bucket", field=field, value=place, remedy="copy it and give a local directory"
            )
    assert isinstance(source, pathlib.Path)
    assert isinstance(directory, pathlib.Path)
    choices = {"weights": (weights, WEIGHTS), "dtype": (dtype, DTYPES), "to_format": (to_format, (None, *FORMATS))}
    for field, (value, known) in choices.items():
        if value not in known:
            raise errors.UserError(
                "is unknown", field=field, value=value, remedy=f"choose one of {', '.join(filter(None, known))}"
            )
    _check_free(directory)
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
            "is for PyTorch tensors, and a run directory holds float32",
            field="dtype",
            value=dtype,
            remedy="leave it out",
        )
    compares = has_torch if verify is None else verify
    with leases.owned(directory, "to"):
        _check_free(directory)  # Another process may have made it while the source was read.
        with storage.new_directory(directory) as partial:
            if to_format == "jax":
                compared = _write_run(partial, model, compares)
            else:
                compared = _write_torch(partial, model, dtype, compares, with_stablehlo=to_format == "stablehlo")
    facts = {"to": str(directory), "to_format": to_format, "dtype": dtype, "num_parameters": model.num_parameters}
    found = compared._asdict() if compared else dict.fromkeys(verification.Comparison._fields)
    return model.origin | facts | found


def describe(result: dict[str, Any]) -> str:
    """A summary of what `convert` returned, in two lines."""
    step = f" of step {result['step']}" if "step" in result else ""
    lines = [
        f"wrote {result['to']}: {result['num_parameters']} parameters in {result['dtype']}, "
        f"{result.get('weights', 'the')} weights{step} of {result['from']}; the optimizer state is not converted"
    ]
    if result["largest_difference"] is None:
        has_torch = importlib.util.find_spec("torch") is not None
        why = "as asked" if has_torch else "install torch to compare with the PyTorch network"
        lines.append(f"not verified: {why}")
    else:
        compared = verification.Comparison(**{name: result[name] for name in verification.Comparison._fields})
        lines.append(f"verified: {compared}")
    return "\n".join(lines)


def _check_free(directory: pathlib.Path) -> None:
    if not storage.is_free(directory):
        raise errors.UserError(
            "exists and is not empty", field="to", value=directory, remedy=f"use another {errors.name('to')}"
        )


def _read(source: pathlib.Path, weights: str, step: int | None, spec: str) -> tuple[Model, str]:
    """The model of a source, and the format to convert it to by default."""
    if not source.exists():
        if not published_checkpoints.is_hub_name(str(source)):
            raise errors.UserError("does not exist", field="from", value=source, remedy="correct the path")
        source = published_checkpoints.download(str(source))
    read = published_checkpoints.find_reader(source)
    if read is not None:
        if step is not None:
            raise errors.UserError(
                "selects a checkpoint of a run directory",
                field="step",
                value=step,
                remedy=f"give the file of that step in {source} instead",
            )
        return _from_checkpoint(read(source, weights), source, spec), "jax"
    if not (source / storage.CHECKPOINTS).exists():
        raise errors.UserError(
            "is not a checkpoint",
            field="from",
            value=source,
            remedy="give a run directory, a directory with config.json and model.safetensors or pytorch_model.bin, a "
            "directory with .hydra/ and checkpoints-meta/, or a .pth or .ckpt file",
        )
    if spec:
        raise errors.UserError(
            f"is not needed, since the run directory {source} has its own",
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
            f"has {run.graph.vocab_size} tokens, but the checkpoint has {checkpoint.num_tokens}",
            field="tokenizer",
            value=spec or published_checkpoints.TOKENIZER,
            remedy="give the tokenizer of the checkpoint",
        )
    tensors = {name: np.asarray(tensor, np.float32) for name, tensor in checkpoint.tensors.items()}
    tensors.setdefault(torch_weights.ROTARY, torch_weights.rotary(run.network))
    if checkpoint.start_id is not None:
        # Ours begins every sequence with the mask, so the mask's embedding becomes that of the token they begin with.
        embedding = tensors["vocab_embed.embedding"].copy()
        embedding[run.graph.mask_id] = embedding[checkpoint.start_id]
        tensors["vocab_embed.embedding"] = embedding
    return Model(run=run, tensors=tensors, origin=checkpoint.origin, is_conditioned=checkpoint.is_conditioned)


def _find_tokenizer(
    checkpoint: published_checkpoints.Checkpoint, source: pathlib.Path, spec: str
) -> tokenizers.Tokenizer:
    """The tokenizer asked for, else the source's own, else GPT-2's if the vocabulary size matches, else plain ids."""
    if not spec and (source / published_checkpoints.TOKENIZER).exists():
        return tokenizers.read(source / published_checkpoints.TOKENIZER)
    if not spec and checkpoint.tokenizer not in ("", "gpt2"):
        raise errors.UserError(
            f"{source} was trained with the tokenizer {checkpoint.tokenizer}, and does not say which id is the mask",
            remedy=f"give {errors.name('tokenizer')}, such as wordpiece:vocab.txt",
        )
    # MDLM's descendants append an id for padding or a mask to GPT-2's, also where the graph has no mask.
    of_gpt2 = (tokenizers.VOCAB_SIZES["gpt2"], tokenizers.VOCAB_SIZES["gpt2"] + 1)
    usual = "gpt2" if checkpoint.num_tokens in of_gpt2 else f"ids:{checkpoint.num_tokens}"
    tokenizer = tokenizers.build(spec or usual, lambda: iter(()))
    if isinstance(tokenizer, subwords.GPT2) and checkpoint.num_tokens == tokenizer.vocab_size + 1:
        return dataclasses.replace(tokenizer, num_unused=1)
    return tokenizer


def _write_run(directory: pathlib.Path, model: Model, compares: bool) -> verification.Comparison | None:
    run = model.run
    params = torch_weights.from_torch(_told_noise(model), run.network)
    state = train_state.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=params,
        opt_state=optimizers.make_optimizer(run.config.optimizer, run.config.training.num_steps).init(params),
    )
    written = runs.fill(directory, run.config, run.tokenizer, state)
    runs.write_json(directory / "origin.json", model.origin)
    if not compares:
        return None
    theirs = verification.load(published_configs.to_sedd(run), model.tensors, is_causal=run.is_autoregressive)
    return _agreeing(theirs, written.params("ema_params")[1], run, is_conditioned=model.is_conditioned)


def _write_torch(
    directory: pathlib.Path, model: Model, dtype: str, compares: bool, *, with_stablehlo: bool
) -> verification.Comparison | None:
    run = model.run
    published_configs.check_publishable(run)
    tensors = _rounded(_told_noise(model), dtype)
    origin = {**model.origin, "dtype": dtype, "config": configs.to_dict(run.config)}
    if run.network.normalize:
        origin["note"] = published_configs.NOTE
    described = published_configs.to_sedd(run) | published_configs.FOR_TRANSFORMERS | {"sedd_jax": origin}
    runs.write_json(directory / "config.json", measured.without_directories(described))
    try:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise errors.UserError(
            f"cannot write {directory / 'model.safetensors'} ({error})", remedy="make room, or use another directory"
        ) from error
    # safetensors makes its files readable by their owner only.
    (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)
    tokenizers.write(run.tokenizer, directory / published_checkpoints.TOKENIZER)
    if isinstance(run.tokenizer, subwords.SentencePiece):
        (directory / "tokenizer.model").write_bytes(run.tokenizer.file())
    for name in CODE:
        shutil.copyfile(pathlib.Path(__file__).parent / name, directory / name)
    if with_stablehlo:
        exported = score_export.export(tensors, run.network, run.config.data.length)
        (directory / "score.stablehlo").write_bytes(exported)
        (directory / "example.py").write_text(model_cards.STABLEHLO_EXAMPLE, encoding="utf-8")
    found = measured.find(run, model.origin.get("step"), model.origin.get("weights", "ema"), dtype)
    for name, picture in found.pictures.items():
        shutil.copyfile(picture, directory / name)
    card = model_cards.card(run, model.origin, model.num_parameters, dtype, found, with_stablehlo=with_stablehlo)
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
            f"{compared}, so nothing was written",
            remedy=f"{errors.name('verify')}=false writes the model without this check",
        )
    return compared


def _told_noise(model: Model) -> dict[str, np.ndarray]:
    """Tensors of a network with the same outputs that accepts any noise level."""
    return model.tensors if model.is_conditioned else torch_weights.without_noise(model.tensors)


def _rounded(tensors: dict[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """The tensors in another dtype. The rotary frequencies stay float32, because they are not weights."""
    with np.errstate(over="ignore"):  # The check below names the tensor that overflows.
        narrow = {
            name: x if name == torch_weights.ROTARY else x.astype(jnp.dtype(dtype)) for name, x in tensors.items()
        }
    for name, x in narrow.items():
        if not np.isfinite(x.astype(np.float32)).all():
            raise errors.UserError(
                f"cannot hold the values of {name}", field="dtype", value=dtype, remedy="use bfloat16 or float32"
            )
    return narrow
