"""`sedd eval`: what it can measure, and the flags that each measurement takes."""

from typing import Any

from absl import flags

from sedd_jax.cli import arguments

_SAMPLING = ("num_steps", "draw", *arguments.REFINEMENTS, "seed", "batch_size", "num_samples")
# What is asked for -> the flags it takes beside --workdir, --step, --json and those of processes.
_MODES = {
    "likelihood": ("data", "split", "protocol", "num_times", "target_stderr", "batch_size", "seed"),
    "zero_shot": ("suite_data", "protocol", "num_times", "target_stderr", "batch_size", "seed"),
    "humaneval": ("problems", "timeout_s", "sampler", *_SAMPLING),
    "generate": ("judge", "sampler", *_SAMPLING),
    "curve": ("judge", "samplers", *arguments.REFINEMENTS, "batch_size", "num_samples", "seed"),
    "infill": ("judge", "num_draws", "sampler", *_SAMPLING),
    "code": ("num_samples", "num_steps", "seed"),
    "report": (),
}


def define(values: flags.FlagValues) -> None:
    """Defines the flags of `sedd eval`."""
    text, number, choice = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_bool
    text("workdir", None, "run directory", flag_values=values)
    number("step", None, "checkpoint; the newest if not given", flag_values=values)
    text("data", None, "prepared:DIR or another source; the run's own if not given", flag_values=values)
    text("split", None, "train, valid or test; valid of its own text, test of other", flag_values=values)
    text("protocol", "published", "or strict: with prior and reconstruction terms", flag_values=values)
    number("num_times", None, "draws of time and noise for each sequence", flag_values=values)
    flags.DEFINE_float("target_stderr", 0.01, "else as many as this needs, nats per token", flag_values=values)
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
    text("problems", None, "with --suite=humaneval: JSON lines in HumanEval's format", flag_values=values)
    flags.DEFINE_float("timeout_s", 3.0, "with --suite=humaneval: seconds of an attempt", 0.01, flag_values=values)
    choice("generate", False, "perplexity of samples under --judge, and their entropy", flag_values=values)
    text("curve", None, "steps:16,32,... or nfe:17,33,...: the same for --samplers", flag_values=values)
    text("infill", None, "paper, prompt or a pattern such as 25{50}25: refill held-out text", flag_values=values)
    choice("code", False, "share of samples and infills that Python parses", flag_values=values)
    choice("report", False, "write RUN/report.html from all that was measured", flag_values=values)
    text("judge", None, "an autoregressive run, or GPT-2 in a directory for transformers", flag_values=values)
    text("sampler", None, "of what is drawn: the run's if not given", flag_values=values)
    text("samplers", "tweedie,tau_leaping", "with --curve: which", flag_values=values)
    arguments.define_refinements(values)
    text("draw", None, "precise, or published (float32 noise that anneals)", flag_values=values)
    number("num_samples", None, "sequences, windows, or attempts at a problem: 64, or 10", 1, flag_values=values)
    number("num_draws", 1, "with --infill: how often a window is refilled", 1, flag_values=values)
    number("num_steps", None, "reverse steps of what is drawn; the run's if not given", flag_values=values)
    choice("json", False, "end with one line of JSON", flag_values=values)
    arguments.define_processes(values)


def measure(values: flags.FlagValues, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Measures what the flags ask for.

    Args:
        values: the flags, which know what was typed.
        given: their values, the run directory as a path.

    Returns:
        The result and what to print of it.
    """
    mode = _mode(values, given)
    chosen = {name: given[name] for name in ("step", *_MODES[mode]) if given.get(name) is not None}
    workdir = given["workdir"]
    program: Any
    if mode in ("likelihood", "zero_shot"):
        from sedd_jax.evaluation import perplexity as program

        names = ("protocol", "num_times", "target_stderr", "batch_size", "seed")
        settings = program.Settings(**{name: given[name] for name in names})
        others = {name: value for name, value in chosen.items() if name not in names}
        if mode == "likelihood":
            result = program.evaluate(workdir, **others, settings=settings)
        else:
            from sedd_jax.evaluation import zero_shot as program

            result = program.evaluate_sets(
                workdir, directory=given["suite_data"], step=given["step"], settings=settings
            )
    elif mode == "report":
        from sedd_jax.evaluation import report

        path = report.write(workdir)
        return {"report": str(path)}, f"wrote {path}"
    elif mode == "code":
        from sedd_jax.evaluation import code_quality as program

        result = program.measure(workdir, **chosen)
    elif mode == "humaneval":
        from sedd_jax.evaluation import code_problems as program

        result = program.measure(workdir, **chosen)
    elif mode == "infill":
        from sedd_jax.evaluation import refilling as program

        result = program.measure(workdir, given["infill"], **chosen)
    elif mode == "generate":
        from sedd_jax.evaluation import generation_quality as program

        result = program.measure(workdir, **chosen)
    else:
        from sedd_jax.evaluation import quality_curves as program

        samplers = chosen.pop("samplers").split(",")
        result = program.measure(workdir, **chosen, **_points(given["curve"]), samplers=samplers)
    return result, program.table(result)


def _mode(values: flags.FlagValues, given: dict[str, Any]) -> str:
    """What is asked for.

    Raises:
        flags.IllegalFlagValueError: where that is two things, or a flag of another is given, or one is missing.
    """
    asked = [name for name in ("suite", "generate", "curve", "infill", "code", "report") if given[name]]
    if len(asked) > 1:
        raise flags.IllegalFlagValueError(f"--{asked[0]} goes without --{asked[1]}")
    mode = (given["suite"] if asked == ["suite"] else asked[0]) if asked else "likelihood"
    shown = "" if not asked else f" with --{asked[0]}" + (f"={mode}" if asked == ["suite"] else "")
    for name in {name for names in _MODES.values() for name in names} - set(_MODES[mode]):
        if values[name].present:
            owners = [other for other, names in _MODES.items() if name in names]
            raise flags.IllegalFlagValueError(f"--{name} has no meaning{shown}: it is of {', '.join(owners)}")
    if mode in ("generate", "curve") and not given["judge"]:
        raise flags.IllegalFlagValueError(
            f"--judge=RUN must be given{shown}: an autoregressive run, or GPT-2 in a directory"
        )
    if mode == "humaneval" and not given["problems"]:
        raise flags.IllegalFlagValueError(f"--problems=FILE must be given{shown}")
    return mode


def _points(curve: str) -> dict[str, Any]:
    """The points of a curve, as what `quality_curves.measure` takes."""
    kind, _, numbers = curve.partition(":")
    try:
        points = [int(number) for number in numbers.split(",")]
    except ValueError:
        points = []
    if kind not in ("steps", "nfe") or not points:
        raise flags.IllegalFlagValueError(
            f"--curve={curve} is no list of steps: give one such as steps:16,32,64, or nfe:17,33,65"
        )
    return {"num_steps" if kind == "steps" else "num_evaluations": points}
