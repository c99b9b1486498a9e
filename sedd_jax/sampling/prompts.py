"""Draws texts for a file of prompts, one JSON object per line; each text is saved as soon as it is finished."""

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
from sedd_jax.runtime import errors, processes, storage, terminals
from sedd_jax.sampling import generate, patterns, refill, templates

_FIELDS = ("template", "prefix", "suffix")
# Fields of a sample that are known only once it is drawn.
_DRAWN = ("text", "tokens", "nfe")


class Prompt(NamedTuple):
    """What is known of one text.

    Attributes:
        fields: the prompt as the file has it; None for a prompt from the command line.
        template: the same prompt as tokens.
    """

    fields: dict[str, str] | None
    template: templates.Template


def read(run: runs.Run, path: pathlib.Path) -> list[Prompt]:
    """Reads a prompt from each line of a file.

    A line is {"template": "..."}, or an object with "prefix", "suffix" or both.

    Raises:
        errors.UserError: names the line that is not a prompt, or that this run cannot fill.
    """
    refuse = lambda problem, remedy: errors.UserError(problem, field="prompts", value=path, remedy=remedy)
    if not path.is_file():
        raise refuse("is not a file", "give one with a JSON object a line")
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise refuse(f"is not UTF-8 text ({error})", "save it as UTF-8") from error
    if lines == [""]:
        raise refuse("is empty", "give a JSON object a line")
    found, checked = [], set()
    for number, line in enumerate(lines, start=1):
        try:
            prompt = _parse(run, line)
            kinds = patterns.kinds(prompt.template.gaps).keys()
            # Compiling a pattern takes a while, and many lines have the same one.
            if not kinds <= checked:
                templates.compile_patterns(run, [prompt.template])
                checked |= kinds
            found.append(prompt)
        except errors.UserError as error:
            raise error.at(f"{path}:{number}") from error
    return found


def _parse(run: runs.Run, line: str) -> Prompt:
    wanted = 'give {"template": "..."} or {"prefix": "...", "suffix": "..."}'
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"{line[:40]!r} is not JSON", remedy=wanted) from error
    if not isinstance(fields, dict) or not fields or set(fields) - set(_FIELDS):
        raise errors.UserError(f"{line[:40]!r} is no prompt", remedy=wanted)
    for name, value in fields.items():
        if not isinstance(value, str):
            raise errors.UserError("is not text", field=name, value=repr(value), remedy=wanted)
    template = templates.read(run, templates.Written(**fields))
    if run.is_autoregressive:
        autoregression.refuse_text_after_gaps(template.is_given[None])
    return Prompt(fields, template)


def sample(
    workdir: storage.Directory,
    asked: pathlib.Path | templates.Written,
    *,
    ends: refill.Ends = refill.NO_ENDS,
    out: str = "",
    step: int | None = None,
    seed: int = 0,
    watch: terminals.Watch | None = None,
    **settings: Any,
) -> list[generate.Sample]:
    """Draws a text for each line of a file, or `num_samples` texts for one prompt, from a checkpoint of a run.

    Args:
        workdir: the run directory.
        asked: the file of prompts, see `read`; or one prompt.
        ends: where texts end.
        out: .jsonl file to which each text is appended as soon as it is finished; "" for none. If the same command was
            stopped before, the texts that it has drawn for a file of prompts are kept, and only the others are drawn.
        step: training step of the checkpoint; the newest if None.
        seed: seed of all random numbers.
        watch: see `refill.draw`.
        **settings: fields of `config.SamplingConfig` that differ from the run's. For a file of prompts, `num_samples`
            is the number of slots: texts drawn at the same time.

    Returns:
        Texts in the order of the prompts.

    Raises:
        errors.UserError: where the run, a prompt or a setting cannot be used, or `out` holds other results.
    """
    run, is_file = runs.load(workdir), isinstance(asked, pathlib.Path)
    changed = run.sampling(**settings)
    if isinstance(asked, pathlib.Path):
        wanted = read(run, asked)
    else:
        wanted = [Prompt(None, templates.read(run, asked))] * changed.num_samples
    if ends.stop_at_eos:
        refill.eos_id_of(run)
    opened = run.restore(step)
    how = {"seed": seed, "step": opened.step, "checksum": opened.checksum, "stop_at_eos": ends.stop_at_eos}
    expected = [_described(run, changed, prompt, index, fit=ends.fit, **how) for index, prompt in enumerate(wanted)]
    results = pathlib.Path(out) if out else None
    done = _finished(results, expected, keep=is_file)
    left = [index for index in range(len(wanted)) if index not in done]
    # The texts that are left take the slots of finished ones, so they must not get the same random numbers.
    own = seed if not done else int(np.random.SeedSequence([seed, len(done)]).generate_state(1)[0])
    with opened.on_devices():
        texts = [wanted[index].template for index in left]
        for drawn in refill.draw(opened, texts, changed, seed=own, ends=ends, watch=watch):
            index, tokens = left[drawn.index], drawn.tokens
            text = run.tokenizer.decode(tokens)
            one = generate.Sample(text=text, tokens=tokens.tolist(), nfe=drawn.nfe, **expected[index])
            done[index] = one
            if results is not None and processes.is_first():
                with results.open("a", encoding="utf-8") as file:
                    file.write(generate.to_line(one))
    return [done[index] for index in range(len(wanted))]


def _described(
    run: runs.Run, settings: configs.SamplingConfig, prompt: Prompt, index: int, *, fit: bool, **how: Any
) -> dict[str, Any]:
    """The fields of a `generate.Sample` that are known before it is drawn."""
    exists = slice(prompt.template.length if fit else None)
    circumstances = generate.circumstances(run, settings, int((~prompt.template.is_given[exists]).sum()))
    return circumstances | how | {"fit": fit, "index": index, "prompt": prompt.fields}


def _finished(
    path: pathlib.Path | None, expected: Sequence[dict[str, Any]], *, keep: bool
) -> dict[int, generate.Sample]:
    """Finished samples in a file of results, by index. Prepares the file for more.

    Only the first process reads the file. The others learn the indices and get samples without a text.
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
    if path.exists() and not path.is_file():  # Such as /dev/stdout: it keeps nothing, and reading it may never end.
        return {}
    content = path.read_bytes() if keep and path.exists() else b""
    # A last line without a line end was being written when the command was stopped.
    end = content.rfind(b"\n") + 1
    found = {}
    for number, line in enumerate(content[:end].split(b"\n")[:-1], start=1):
        try:
            sample = generate.Sample.from_dict(json.loads(line))
            if {name: x for name, x in vars(sample).items() if name not in _DRAWN} != expected[sample.index]:
                raise ValueError("drawn in another way, from other weights, or for another prompt")
        except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise errors.UserError(
                f"holds other results, in line {number}",
                field="out",
                value=path,
                remedy=f"remove it, or give another {errors.name('out')}",
            ) from error
        found[sample.index] = sample
    with path.open("ab") as file:
        file.truncate(end)
    return found
