"""`sedd sample`: its flags, and what is drawn with them."""

import json
import pathlib
from typing import Any

from absl import flags

from sedd_jax.cli import arguments
from sedd_jax.runtime import errors

_SETTINGS = ("num_steps", "num_samples", "sampler", "draw")


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sedd sample`."""
    text, choice = flags.DEFINE_string, flags.DEFINE_bool
    text("workdir", None, "run directory", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; the newest if not given", flag_values=values)
    arguments.define_sampling(values, *_SETTINGS, *arguments.refinements())
    flags.DEFINE_integer("seed", 0, "the same seed draws the same text", 0, 2**32 - 1, flag_values=values)
    text("prefix", "", "text the samples start with", flag_values=values)
    text("suffix", "", "text the samples end with", flag_values=values)
    text(
        "template",
        "",
        "text with gaps: {n} is n tokens to fill, {n:REGEX} with text that matches, {{ a brace",
        flag_values=values,
    )
    text(
        "prompts",
        "",
        'file with a prompt on each line, {"template": ...} or {"prefix": ..., "suffix": ...}; num_samples at once',
        flag_values=values,
    )
    flags.DEFINE_integer("num_tokens", None, "of a text longer than the model, in blocks", flag_values=values)
    flags.DEFINE_integer("block", None, "tokens in a further block; half of the model's length", flag_values=values)
    choice("fit", False, "end at the template's end, not at the model's length", flag_values=values)
    choice("stop_at_eos", False, "cut text at the first end of text that is drawn", flag_values=values)
    choice("watch", False, "show the text as it is denoised", flag_values=values)
    text("out", "", "also write text, tokens, seed, nfe and sampler to this .jsonl", flag_values=values)
    choice("json", False, "end with one line of JSON", flag_values=values)
    arguments.define_processes(values)


def draw(given: dict[str, Any], *, is_first: bool) -> str:
    """Draws what the flags ask for, and keeps it where `--out` says.

    Args:
        given: values of the flags, the run directory as a path.
        is_first: whether this process writes results.

    Returns:
        What to print.
    """
    _check(given)
    from sedd_jax.runtime import terminals
    from sedd_jax.sampling import generate, prompts, refill, sliding_blocks, templates

    settings = {name: given[name] for name in (*_SETTINGS, *arguments.refinements()) if given[name] is not None}
    written = templates.Written(**{name: given[name] for name in templates.Written._fields})
    ends = refill.Ends(fit=given["fit"], stop_at_eos=given["stop_at_eos"])
    out = pathlib.Path(given["out"]) if given["out"] else None
    # Where texts may differ in length, each is written once it is finished.
    is_refilled = bool(given["prompts"]) or any(ends)
    with terminals.watcher(shows_text=given["watch"]) as watch:
        common: dict[str, Any] = {"step": given["step"], "seed": given["seed"], "watch": watch, **settings}
        if given["num_tokens"] is not None:
            sizes = {"num_tokens": given["num_tokens"], "block": given["block"]}
            samples = sliding_blocks.sample(given["workdir"], written, **sizes, **common)
        elif is_refilled:
            asked = pathlib.Path(given["prompts"]) if given["prompts"] else written
            samples = prompts.sample(given["workdir"], asked, ends=ends, out=given["out"], **common)
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
    """Raises where flags do not go together, or results could not be kept."""
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
    if given["out"] and not pathlib.Path(given["out"]).absolute().parent.is_dir():
        raise errors.UserError(
            "is in a directory that does not exist", field="out", value=given["out"], remedy="make it first"
        )
