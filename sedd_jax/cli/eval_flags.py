"""`sedd eval`: its flags, and the table of what it can measure."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from sedd_jax.cli import arguments
from sedd_jax.runtime import storage

# What is measured, and what to print of it.
Measured = tuple[dict[str, Any], Any]
_PASSES = ("protocol", "num_times", "target_stderr", "batch_size", "seed")


class Mode(NamedTuple):
    """Something that can be measured.

    Attributes:
        flags: those it takes beside --workdir, --step, --json and those of processes.
        measure: (run directory, values of those flags and of --step that are given) -> result and what to print.
    """

    flags: tuple[str, ...]
    measure: Callable[[storage.Directory, dict[str, Any]], Measured]


def _likelihood(workdir: storage.Directory, given: dict[str, Any]) -> Measured:
    from sedd_jax.evaluation import comparisons, perplexity

    settings = perplexity.Settings(**{name: given.pop(name) for name in _PASSES if name in given})
    if "against" in given:
        result = comparisons.measure(workdir, **given, settings=settings)
        return result, comparisons.table(result)
    result = perplexity.evaluate(workdir, **given, settings=settings)
    return result, perplexity.table(result)


def _zero_shot(workdir: storage.Directory, given: dict[str, Any]) -> Measured:
    from sedd_jax.evaluation import perplexity, zero_shot

    settings = perplexity.Settings(**{name: given.pop(name) for name in _PASSES if name in given})
    result = zero_shot.evaluate_sets(workdir, directory=given["suite_data"], step=given.get("step"), settings=settings)
    return result, zero_shot.table(result)


def _humaneval(workdir: storage.Directory, given: dict[str, Any]) -> Measured:
    from sedd_jax.evaluation import code_problems

    attempts = _taken(given, code_problems.ATTEMPTS)
    result = code_problems.measure(workdir, **given, attempts=attempts)
    return result, code_problems.table(result)


def _generate(workdir: storage.Directory, given: dict[str, Any]) -> Measured:
    from sedd_jax.evaluation import generation_quality

    samples = _taken(given, generation_quality.SAMPLES)
    result = generation_quality.measure(workdir, **given, samples=samples)
    return result, generation_quality.table(result)


def _curve(workdir: storage.Directory, given: dict[str, Any]) -> Measured:
    from sedd_jax.evaluation import generation_quality, quality_curves

    curve = quality_curves.Curve(samplers=given.pop("samplers").split(","), **_points(given.pop("curve")))
    samples = _taken(given, generation_quality.SAMPLES)
    result = quality_curves.measure(workdir, **given, curve=curve, samples=samples)
    return result, quality_curves.table(result)


def _frontier(workdir: storage.Directory, given: dict[str, Any]) -> Measured:
    from sedd_jax.evaluation import frontiers, generation_quality

    frontier, beside = frontiers.parse(given.pop("frontier")), _runs(given.pop("beside", ""))
    samples = _taken(given, generation_quality.SAMPLES)
    result = frontiers.measure(workdir, **given, frontier=frontier, beside=beside, samples=samples)
    return result, frontiers.table(result)


def _infill(workdir: storage.Directory, given: dict[str, Any]) -> Measured:
    from sedd_jax.evaluation import generation_quality, refilling

    samples = _taken(given, generation_quality.SAMPLES)
    result = refilling.measure(workdir, given.pop("infill"), **given, samples=samples)
    return result, refilling.table(result)


def _conditional(workdir: storage.Directory, given: dict[str, Any]) -> Measured:
    from sedd_jax.bounds import continuations
    from sedd_jax.evaluation import conditionals

    budget = _taken(given, continuations.BUDGET)
    result = conditionals.measure(workdir, given.pop("conditional"), **given, budget=budget)
    return result, conditionals.table(result)


def _taken(given: dict[str, Any], defaults: Any) -> Any:
    """Takes the fields of a dataclass out of the given values; `defaults` with these fields set."""
    names = [field.name for field in dataclasses.fields(defaults) if field.name in given]
    return dataclasses.replace(defaults, **{name: given.pop(name) for name in names})


def _code(workdir: storage.Directory, given: dict[str, Any]) -> Measured:
    from sedd_jax.evaluation import code_quality

    result = code_quality.measure(workdir, **given)
    return result, code_quality.table(result)


def _report(workdir: storage.Directory, given: dict[str, Any]) -> Measured:
    from sedd_jax.evaluation import report

    path = report.write(workdir, _runs(given.get("beside", "")))
    return {"report": str(path)}, f"wrote {path}"


def _runs(names: str) -> list[storage.Directory]:
    return [storage.directory(name) for name in names.split(",") if name]


def modes() -> dict[str, Mode]:
    """Everything that can be measured, by what it is asked for with."""
    refinements = tuple(arguments.refinements())
    drawn = ("num_steps", "draw", *refinements, "seed", "batch_size", "num_samples")
    fixed = tuple(name for name in refinements if name not in ("temperature", "top_p"))
    return {
        "likelihood": Mode(("data", "split", "against", *_PASSES), _likelihood),
        "zero_shot": Mode(("suite_data", *_PASSES), _zero_shot),
        "conditional": Mode(("num_times", "target_stderr", "batch_size", "seed"), _conditional),
        "humaneval": Mode(("problems", "timeout_s", "sampler", *drawn), _humaneval),
        "generate": Mode(("judge", "sampler", *drawn), _generate),
        "curve": Mode(("judge", "samplers", *refinements, "batch_size", "num_samples", "seed"), _curve),
        "frontier": Mode(
            ("judge", "beside", "sampler", "num_steps", *fixed, "seed", "batch_size", "num_samples"), _frontier
        ),
        "infill": Mode(("judge", "num_draws", "sampler", *drawn), _infill),
        "code": Mode(("num_samples", "num_steps", "seed"), _code),
        "report": Mode(("beside",), _report),
    }


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sedd eval`."""
    text, number, choice = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool
    text("workdir", None, "run directory", flag_values=values)
    number("step", None, "checkpoint; the newest if not given", flag_values=values)
    text("data", None, "prepared:DIR or another source; the run's own if not given", flag_values=values)
    text("split", None, "train, valid or test; valid of its own text, test of other", flag_values=values)
    text("against", None, "another run: the difference of both bounds, with an error of its own", flag_values=values)
    text("protocol", "published", "or strict: with prior and reconstruction terms", flag_values=values)
    text(
        "conditional", None, "JSON lines of context and continuation, or choices: their likelihood", flag_values=values
    )
    help_text = "draws of time and noise for each sequence; with --conditional at most so many, 1024 if not given"
    number("num_times", None, help_text, flag_values=values)
    flags.DEFINE_float(
        "target_stderr", 0.01, "else as many as this standard error needs, nats per token", flag_values=values
    )
    number("batch_size", 32, "sequences at once", 1, flag_values=values)
    number("seed", 0, "of times, noise, samples and choices", 0, 2**32 - 1, flag_values=values)
    flags.DEFINE_enum(
        "suite",
        None,
        ["zero_shot", "humaneval"],
        "the paper's table 1 with this run in it, or pass@k of code",
        flag_values=values,
    )
    text("suite_data", "data", "with --suite=zero_shot: where prepared sets are", flag_values=values)
    text(
        "problems",
        None,
        "with --suite=humaneval: HumanEval.jsonl, HumanEvalPlus.jsonl or mbpp.jsonl",
        flag_values=values,
    )
    patience = "with --suite=humaneval: least seconds of an attempt; 3, or 4 at each input of HumanEval+"
    flags.DEFINE_float("timeout_s", None, patience, 0.01, flag_values=values)
    choice("generate", False, "perplexity of samples under --judge, and their entropy", flag_values=values)
    text("curve", None, "steps:16,32,... or nfe:17,33,...: the same for --samplers", flag_values=values)
    text(
        "frontier",
        None,
        "temperature:0.7,0.85/top_p:0.9,...: perplexity of samples under --judge against their entropy",
        flag_values=values,
    )
    text("infill", None, "paper, prompt or a pattern such as 25{50}25: refill held-out text", flag_values=values)
    choice("code", False, "share of samples and infills that Python parses", flag_values=values)
    choice("report", False, "write RUN/report.html from all that was measured", flag_values=values)
    text(
        "beside",
        None,
        "with --report or --frontier: other runs, such as RUN2,RUN3, side by side with this one",
        flag_values=values,
    )
    text("judge", None, "an autoregressive run, or GPT-2 in a directory for transformers", flag_values=values)
    text("samplers", "tweedie,tau_leaping", "with --curve: which", flag_values=values)
    number("num_samples", None, "sequences, windows, or attempts at a problem: 64, or 10", 1, flag_values=values)
    number("num_draws", 1, "with --infill: how often a window is refilled", 1, flag_values=values)
    arguments.define_sampling(values, "sampler", "num_steps", "draw", *arguments.refinements())
    choice("json", False, "end with one line of JSON", flag_values=values)
    arguments.define_processes(values)


def measure(values: flags.FlagValues, given: dict[str, Any]) -> Measured:
    """Measures what the flags ask for.

    Args:
        values: the flags, which know what was typed.
        given: their values, the run directory as a path.

    Returns:
        The result and what to print of it.
    """
    asked = _asked(given)
    name = given["suite"] if asked == "suite" else asked or "likelihood"
    shown = "" if asked is None else f" with --{asked}" + (f"={name}" if asked == "suite" else "")
    table = modes()
    _check(values, table, name, shown)
    for flag, what in (("judge", "RUN"), ("problems", "FILE")):
        is_needed = flag in table[name].flags and name != "infill"
        if is_needed and not given[flag]:
            hint = ": an autoregressive run, or GPT-2 in a directory" if flag == "judge" else ""
            raise flags.IllegalFlagValueError(f"--{flag}={what} must be given{shown}{hint}")
    wanted = ("step", *table[name].flags, *([asked] if asked in ("curve", "frontier", "infill", "conditional") else []))
    chosen = {flag: given[flag] for flag in wanted if given.get(flag) is not None}
    return table[name].measure(given["workdir"], chosen)


def _asked(given: dict[str, Any]) -> str | None:
    """The flag that says what is asked for; None for a likelihood.

    Raises:
        flags.IllegalFlagValueError: where that is two things.
    """
    asked = [
        name
        for name in ("suite", "conditional", "generate", "curve", "frontier", "infill", "code", "report")
        if given[name]
    ]
    if len(asked) > 1:
        raise flags.IllegalFlagValueError(f"--{asked[0]} goes without --{asked[1]}")
    return asked[0] if asked else None


def _check(values: flags.FlagValues, table: dict[str, Mode], name: str, shown: str) -> None:
    """Raises flags.IllegalFlagValueError where a flag of another measurement is given."""
    for flag in {flag for mode in table.values() for flag in mode.flags} - set(table[name].flags):
        if values[flag].present:
            owners = [other for other, mode in table.items() if flag in mode.flags]
            raise flags.IllegalFlagValueError(f"--{flag} has no meaning{shown}: it is of {', '.join(owners)}")


def _points(curve: str) -> dict[str, Any]:
    """The points of a curve, as what `quality_curves.measure` takes."""
    kind, _, numbers = curve.partition(":")
    try:
        points = [int(number) for number in numbers.split(",")]
    except ValueError:
        points = []
    if kind not in ("steps", "nfe") or min(points, default=0) < 1:
        raise flags.IllegalFlagValueError(
            f"--curve={curve} is no list of steps: give one such as steps:16,32,64, or nfe:17,33,65"
        )
    return {"num_steps" if kind == "steps" else "num_evaluations": points}
