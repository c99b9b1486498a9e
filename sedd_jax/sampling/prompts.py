"""Texts for a file of prompts, one JSON object a line, each kept as soon as it is finished."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.model import autoregression
from sedd_jax.runtime import processes, sharding, storage, terminals
from sedd_jax.sampling import generate, patterns, refill, templates

_FIELDS = ("template", "prefix", "suffix")
# What of a sample is drawn, not asked for.
_DRAWN = ("text", "tokens", "nfe")


class Prompt(NamedTuple):
    """What is known of a text.

    Attributes:
        fields: as it was given; None where it was on the command line.
        template: the same as tokens.
    """

    fields: dict[str, str] | None
    template: templates.Template


def read(run: runs.Run, path: pathlib.Path) -> list[Prompt]:
    """Reads {"template": "..."}, or {"prefix": "...", "suffix": "..."} with either alone, from each line of a file.

    Raises:
        ValueError: names the line that is something else, or that this run cannot fill.
    """
    if not path.is_file():
        raise ValueError(f"--prompts={path} is not a file: give one with a JSON object a line")
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts={path} is not UTF-8 text: {error}") from error
    if lines == [""]:
        raise ValueError(f"--prompts={path} is empty: give a JSON object a line")
    found, checked = [], set()
    for number, line in enumerate(lines, start=1):
        try:
            prompt = _parse(run, line)
            kinds = patterns.kinds(prompt.template.gaps).keys()
            # Lists repeat patterns, and each takes a while.
            if not kinds <= checked:
                templates.compile_patterns(run, [prompt.template])
                checked |= kinds
            found.append(prompt)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return found


def _parse(run: runs.Run, line: str) -> Prompt:
    wanted = 'give {"template": "..."} or {"prefix": "...", "suffix": "..."}'
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{line[:40]!r} is not JSON: {wanted}") from error
    if not isinstance(fields, dict) or not fields or set(fields) - set(_FIELDS):
        raise ValueError(f"{line[:40]!r} is no prompt: {wanted}")
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}={value!r} is not text: {wanted}")
    template = templates.choose(run, **fields)
    if run.is_autoregressive:
        autoregression.refuse_text_after_gaps(template.is_given[None])
    return Prompt(fields, template)


def sample(
    workdir: storage.Directory,
    *,
    prompts: str = "",
    prefix: str = "",
    suffix: str = "",
    template: str = "",
    fit: bool = False,
    stop_at_eos: bool = False,
    out: str = "",
    step: int | None = None,
    seed: int = 0,
    watch: terminals.Watch | None = None,
    **settings: Any,
) -> list[generate.Sample]:
    """Draws a text for each line of a file, or as many as `num_samples` for one prompt, from a checkpoint of a run.

    Args:
        workdir: the run directory.
        prompts: the file, see `read`; "" for one prompt, which the next three say.
        prefix: see `templates.around`.
        suffix: see `templates.around`.
        template: see `templates.parse`.
        fit: see `refill.draw`.
        stop_at_eos: see `refill.draw`.
        out: .jsonl to which each text is added once it is finished; "" for none. What the same command has drawn of a
            file of prompts before it was stopped is kept, and only the rest drawn.
        step: the checkpoint; the newest if None.
        seed: of everything random.
        watch: see `refill.draw`.
        **settings: fields of `config.SamplingConfig` that differ from the run's; of a file of prompts `num_samples` are
            in work at once.

    Returns:
        Texts in the order of the prompts.
    """
    run = runs.load(workdir)
    changed = generate.sampling_of(run, **settings)
    if prompts and (prefix or suffix or template):
        raise ValueError("--prompts cannot be combined with --template, --prefix or --suffix: write them into the file")
    if prompts:
        asked = read(run, pathlib.Path(prompts))
    else:
        known = templates.choose(run, prefix=prefix, suffix=suffix, template=template)
        asked = [Prompt(None, known)] * changed.num_samples
    if stop_at_eos:
        refill.eos_id_of(run)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    step, params = run.ema_params(mesh, step)
    expected = [
        _described(run, changed, prompt, index, seed=seed, step=step, fit=fit, stop_at_eos=stop_at_eos)
        for index, prompt in enumerate(asked)
    ]
    results = pathlib.Path(out) if out else None
    done = _finished(results, expected, keep=bool(prompts))
    left = [index for index in range(len(asked)) if index not in done]
    # What is left takes the places that others had, and must not be drawn as they were.
    own = seed if not done else int(np.random.SeedSequence([seed, len(done)]).generate_state(1)[0])
    wanted = [asked[index].template for index in left]
    with jax.set_mesh(mesh):
        drawing = refill.draw(run, params, wanted, changed, seed=own, fit=fit, stop_at_eos=stop_at_eos, watch=watch)
        for drawn in drawing:
            index, tokens = left[drawn.index], drawn.tokens
            text = run.tokenizer.decode(tokens)
            one = generate.Sample(text=text, tokens=tokens.tolist(), nfe=drawn.nfe, **expected[index])
            done[index] = one
            if results is not None and processes.is_first():
                with results.open("a", encoding="utf-8") as file:
                    file.write(generate.to_line(one))
    return [done[index] for index in range(len(asked))]


def _described(
    run: runs.Run, settings: configs.SamplingConfig, prompt: Prompt, index: int, *, fit: bool, **how: Any
) -> dict[str, Any]:
    """What is known of a sample before it is drawn."""
    exists = slice(prompt.template.length if fit else None)
    circumstances = generate.circumstances(run, settings, int((~prompt.template.is_given[exists]).sum()))
    return circumstances | how | {"fit": fit, "index": index, "prompt": prompt.fields}


def _finished(
    path: pathlib.Path | None, expected: Sequence[dict[str, Any]], *, keep: bool
) -> dict[int, generate.Sample]:
    """Samples that are in a file of results, by their index; makes it ready for more.

    Every process learns which they are, though only the first reads the file.
    """
    if path is None:
        return {}
    found: dict[int, generate.Sample] = {}
    processes.first_then_all("finished samples", lambda: found.update(_read_results(path, expected, keep=keep)))
    if jax.process_count() == 1:
        return found
    is_found = multihost_utils.broadcast_one_to_all(np.isin(np.arange(len(expected)), list(found)))
    blank = {"text": "", "tokens": [], "nfe": 0}
    return {i: found.get(i, generate.Sample(**blank, **expected[i])) for i in np.flatnonzero(is_found).tolist()}


def _read_results(path: pathlib.Path, expected: Sequence[dict[str, Any]], *, keep: bool) -> dict[int, generate.Sample]:
    content = path.read_bytes() if keep and path.exists() else b""
    # A line without an end was being written when the command was stopped.
    end = content.rfind(b"\n") + 1
    found = {}
    for number, line in enumerate(content[:end].split(b"\n")[:-1], start=1):
        try:
            sample = generate.Sample(**json.loads(line))
            if {name: x for name, x in vars(sample).items() if name not in _DRAWN} != expected[sample.index]:
                raise ValueError("drawn in another way, or for another prompt")
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"--out={path} holds other results, in line {number}: remove it, or give another --out"
            ) from error
        found[sample.index] = sample
    with path.open("ab") as file:
        file.truncate(end)
    return found
