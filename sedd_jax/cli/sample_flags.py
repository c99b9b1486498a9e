"""`sedd sample`: its flags, and the samples drawn with them."""

import json
import pathlib
import tempfile
from typing import Any

from absl import flags

from sedd_jax.cli import arguments
from sedd_jax.runtime import errors, hosts

_SETTINGS = ("num_steps", "num_samples", "sampler", "draw")
_LONGEST_LINE = 2**26  # bytes of a sample in a file of samples


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sedd sample`."""
    text, number, choice = arguments.definers(values)
    text("workdir", None, "run directory")
    number("step", None, "step of the checkpoint; the newest if not given")
    arguments.define_sampling(values, *_SETTINGS, *arguments.refinements())
    number("seed", 0, "random seed; the same seed draws the same text", 0, 2**32 - 1)
    text("prefix", "", "text at the start of each sample")
    text("suffix", "", "text at the end of each sample")
    text(
        "template",
        "",
        "text with gaps: {n} is a gap of n tokens, {n:REGEX} a gap whose text matches; {{ and }} are braces",
    )
    text(
        "prompts",
        None,
        'file with a prompt on each line, {"template": ...} or {"prefix": ..., "suffix": ...}; num_samples run at once',
    )
    number("num_tokens", None, "length of a text longer than the model's, drawn block by block")
    number("block", None, "tokens in each block after the first; half of the model's length if not given")
    choice("fit", False, "end each sequence with its template, not at the model's length")
    choice("stop_at_eos", False, "cut each text at the first end-of-text token that is drawn")
    choice("watch", False, "show the text while it is denoised")
    text("out", None, "also write text, tokens, seed, nfe and sampler to this .jsonl file")
    choice("json", False, "end with one line of JSON")
    arguments.define_processes(values)


def draw(given: dict[str, Any], *, is_first: bool) -> str:
    """Draws the samples that the flags ask for, and writes them to `--out`.

    Args:
        given: values of the flags; the run directory is a path.
        is_first: whether this process writes results.

    Returns:
        The text to print.
    """
    _check(given)
    from sedd_jax.runtime import terminals
    from sedd_jax.sampling import generate, prompts, refill, sliding_blocks, templates

    settings = {name: given[name] for name in (*_SETTINGS, *arguments.refinements()) if given[name] is not None}
    written = templates.Written(**{name: given[name] for name in templates.Written._fields})
    ends = refill.Ends(fit=given["fit"], stop_at_eos=given["stop_at_eos"])
    out = hosts.local_path(given["out"]) if given["out"] else None
    # These use continuous batching, which writes each text to `out` as soon as it is finished.
    is_refilled = bool(given["prompts"]) or any(ends)
    with terminals.watcher(shows_text=given["watch"]) as watch:
        common: dict[str, Any] = {"step": given["step"], "seed": given["seed"], "watch": watch, **settings}
        if given["num_tokens"] is not None:
            sizes = {"num_tokens": given["num_tokens"], "block": given["block"]}
            samples = sliding_blocks.sample(given["workdir"], written, **sizes, **common)
        elif is_refilled:
            asked = hosts.local_path(given["prompts"]) if given["prompts"] else written
            samples = prompts.sample(given["workdir"], asked, ends=ends, out=str(out or ""), **common)
        else:
            samples = generate.generate(given["workdir"], written, **common)
    if out and is_first and not is_refilled:
        generate.write_jsonl(samples, out)
    shown = []
    for sample in samples:
        how = f", annealed: {sample.annealing}" if sample.annealing else ""
        shown.append(f"--- sample {sample.index + 1} of {len(samples)}{how}\n{sample.text}")
    if given["json"]:
        shown.append(json.dumps([sample.to_dict() for sample in samples], ensure_ascii=False))
    return "\n".join(shown)


def _check(given: dict[str, Any]) -> None:
    """Raises an error if flags cannot be combined, or if --out cannot be written."""
    refills = [name for name in ("prompts", "fit", "stop_at_eos") if given[name]]
    if given["num_tokens"] is not None and refills:
        raise flags.IllegalFlagValueError("--num_tokens goes without --prompts, --fit and --stop_at_eos")
    if given["block"] is not None and given["num_tokens"] is None:
        raise flags.IllegalFlagValueError("--block goes with --num_tokens")
    if given["prompts"] and any(given[name] for name in ("template", "prefix", "suffix")):
        raise errors.UserError(
            f"cannot be combined with {errors.name('template')}, {errors.name('prefix')} or {errors.name('suffix')}",
            field="prompts",
            remedy="write them into the file",
        )
    if given["out"]:
        _check_out(hosts.local_path(given["out"]).absolute())
        if not given["prompts"]:  # With a list of prompts every line is compared with what it asks for.
            _check_replaced(hosts.local_path(given["out"]).absolute())


def _check_out(path: pathlib.Path) -> None:
    """Raises errors.UserError if a file cannot be written; nothing is drawn in vain."""
    refuse = lambda problem, remedy: errors.UserError(problem, field="out", value=path, remedy=remedy)
    if path.is_dir():
        raise refuse("is a directory", f"name a file in it, as in {path / 'samples.jsonl'}")
    if not path.parent.is_dir():
        raise refuse("is in a directory that does not exist", "make it first")
    try:
        if path.exists():
            path.open("ab").close()
        if not path.exists() or path.is_file():
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise refuse(f"cannot be written ({error.strerror})", "name a file in another directory") from error


def _check_replaced(path: pathlib.Path) -> None:
    """Raises errors.UserError if a file holds anything else than samples, which new ones may replace."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb") as file:
        line = file.readline(_LONGEST_LINE)
    try:
        is_sample = {"text", "tokens", "sampler"} <= set(json.loads(line))
    except (ValueError, TypeError, RecursionError):
        is_sample = False
    if not is_sample:
        problem = "exists and holds no samples"
        raise errors.UserError(problem, field="out", value=path, remedy="name another file, or remove this one")
