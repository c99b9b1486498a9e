"""Requests of the page of `sedd serve`: reads and checks them, and draws the trajectories that they ask for."""

import collections
import dataclasses
import math
import pathlib
import re
import shlex
import time
import urllib.parse
from typing import Any

import numpy as np
from jaxtyping import Array

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.data import tokenizers
from sedd_jax.model import autoregression, sampling_config, score_draws
from sedd_jax.reverse import correctors, samplers, time_grids
from sedd_jax.runtime import errors, storage
from sedd_jax.sampling import generate, templates
from sedd_jax.serving import pieces, queue

MAX_QUERY = 2**16  # bytes of a URL's query
MAX_SEED = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A field of `config.SamplingConfig` that a request may set. `sedd sample` has a flag of the same name.

    Attributes:
        name: name of the field.
        label: its label on the page.
        choices: its possible values; empty for a number from `least` to `most`.
        least: the smallest number.
        most: the largest number.
        is_shared: whether all columns of the page have the same value.
    """

    name: str
    label: str
    choices: tuple[Any, ...] = ()
    least: int | float = 0
    most: int | float = 0
    is_shared: bool = False


# Few choices: every combination is a program that is compiled once, except that any number of steps shares one.
SETTINGS = (
    Setting(name="sampler", label="Sampler", choices=tuple(samplers.SAMPLERS)),
    Setting(name="num_steps", label="Steps", least=1, most=4096),
    Setting(name="draw", label="Noise", choices=tuple(score_draws.DRAWS)),
    Setting(name="grid", label="Time grid", choices=time_grids.NAMES),
    Setting(name="corrector_steps", label="Corrections", choices=(0, 1, 2, 4)),
    Setting(name="corrector", label="Corrector", choices=(correctors.FORWARD_BACKWARD, "gibbs", "gibbs:margin:4")),
    Setting(name="temperature", label="Temperature", choices=(0.7, 0.8, 0.9, 1.0)),
    Setting(name="top_p", label="Top-p", choices=(0.8, 0.9, 0.95, 1.0)),
    Setting(name="num_samples", label="Samples", choices=(1, 2, 4, 8), is_shared=True),
)
_OF_DIFFUSION = ("sampler", "num_steps", "grid", "corrector_steps", "corrector")
_TYPES: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(configs.SamplingConfig)}


class RefusedError(Exception):
    """A request that is refused, with an HTTP status and one sentence that says why."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """The run that is served.

    Attributes:
        checkpoint: the run with the weights of one checkpoint on the devices.
        compiled: settings that something was drawn with, all with one step, since the number needs no new program; and
            the size of the patterns then.
    """

    checkpoint: runs.OpenRun
    compiled: set[tuple[configs.SamplingConfig, tuple[int, int] | None]] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A valid request.

    Attributes:
        template: as it was written.
        parsed: as it was read.
        settings: how to draw.
        seed: seed of everything random.
        size_of_patterns: `size` of the automaton of the template's patterns; None if it has none.
    """

    template: str
    parsed: templates.Template
    settings: configs.SamplingConfig
    seed: int
    size_of_patterns: tuple[int, int] | None = None


def open_run(workdir: storage.Directory, step: int | None) -> Opened:
    """Opens a run at a checkpoint (the newest if None), as `generate.generate` does."""
    return Opened(checkpoint=runs.load(workdir).restore(step))


def settings_of(run: runs.Run) -> list[Setting]:
    """The settings of a run, each with the choices that the run takes; a baseline has neither sampler nor steps.

    A setting of one choice is left out, such as the corrector of an absorbing run. The run's own values are among the
    choices. Values that do not go together are refused once they are requested.
    """
    own = defaults(run)

    def choices(setting: Setting) -> tuple[Any, ...]:
        taken = [value for value in setting.choices if _takes(run, setting, value)]
        return tuple(dict.fromkeys([*taken, getattr(own, setting.name)])) if taken else ()

    of_run = [
        dataclasses.replace(setting, choices=choices(setting))
        for setting in SETTINGS
        if not (run.is_autoregressive and setting.name in _OF_DIFFUSION)
    ]
    return [setting for setting in of_run if len(setting.choices) != 1]


def defaults(run: runs.Run) -> configs.SamplingConfig:
    """The run's own settings, limited to what a request may ask for, and one sample."""
    own, numbers = run.config.sampling, [setting for setting in SETTINGS if not setting.choices]
    within: dict[str, Any] = {
        setting.name: min(max(getattr(own, setting.name), setting.least), setting.most) for setting in numbers
    }
    return dataclasses.replace(own, **within, num_samples=1)


def describe(opened: Opened) -> dict[str, Any]:
    """All that the page needs to know of a run, for JSON."""
    run, values = opened.checkpoint.run, dataclasses.asdict(defaults(opened.checkpoint.run))
    meanings = {name: meaning for name, _, meaning in configs.describe(configs.to_dict(run.config))}
    return {
        "name": pathlib.PurePath(str(run.workdir)).name,
        "workdir": str(run.workdir),
        "step": opened.checkpoint.step,
        "graph": run.config.graph.name,
        "source": run.config.data.source,
        "tokenizer": run.config.data.tokenizer,
        "unit": run.tokenizer.unit,
        "length": run.config.data.length,
        "example": _example(run),
        "settings": [
            dataclasses.asdict(setting)
            | {
                "type": _TYPES[setting.name].__name__,
                "default": values[setting.name],
                "meaning": meanings[f"sampling.{setting.name}"],
            }
            for setting in settings_of(run)
        ],
        "limits": {"query": MAX_QUERY, "seed": MAX_SEED},
    }


def parse(run: runs.Run, query: str) -> Request:
    """Reads the query of a URL.

    Raises:
        RefusedError: 414 for a query that is too long, 400 for a wrong parameter, 422 for a template that does not fit
            the run.
    """
    if len(query) > MAX_QUERY:
        raise RefusedError(
            414, f"the request is {len(query)} bytes long, at most {MAX_QUERY} are read: shorten the template"
        )
    given = _parameters(query)
    known = {setting.name: setting for setting in settings_of(run)}
    for name in given:
        if name in known or name in ("template", "seed"):
            continue
        if name in _OF_DIFFUSION:
            raise RefusedError(400, f"an autoregressive run draws one token a step: leave {name} out")
        raise RefusedError(400, f"{name!r} is not a parameter: give some of template, seed, {', '.join(known)}")
    changed = {name: _value(known[name], given[name]) for name in known if name in given}
    seed = _value(Setting(name="seed", label="", most=MAX_SEED), given.get("seed", "0"), int)
    template = given.get("template", "")
    try:
        settings = run.sampling(**dataclasses.asdict(defaults(run)) | changed)
    except errors.UserError as error:
        raise RefusedError(400, error.worded(_spelled)) from error
    try:
        if "\0" in template:
            raise errors.UserError(
                "holds the character U+0000, which no command line can", field="template", remedy="remove it"
            )
        parsed = templates.parse(run, template)
        patterns = templates.compile_patterns(run, [parsed])
        generate.refuse_patterns(settings, patterns)
        if run.is_autoregressive:
            autoregression.refuse_text_after_gaps(parsed.is_given)
    except errors.UserError as error:
        raise RefusedError(422, error.worded(_spelled)) from error
    size = None if patterns is None else patterns.automaton.size
    return Request(template=template, parsed=parsed, settings=settings, seed=seed, size_of_patterns=size)


def _spelled(field: str) -> str:
    """The name of an input as the page shows it."""
    return "the template" if field == "template" else field.removeprefix("config.sampling.")


def command(opened: Opened, request: Request) -> str:
    """The `sedd sample` command that draws the same texts."""
    values = {"workdir": opened.checkpoint.run.workdir, "step": opened.checkpoint.step, "template": request.template}
    own = opened.checkpoint.run.config.sampling
    for setting in settings_of(opened.checkpoint.run):
        value = getattr(request.settings, setting.name)
        if setting.name not in sampling_config.REFINEMENTS or value != getattr(own, setting.name):
            values[setting.name] = value
    values |= {"seed": request.seed}
    return " ".join(["sedd sample", *(f"--{name}={shlex.quote(str(value))}" for name, value in values.items())])


def draw(opened: Opened, request: Request, emit: queue.Emit) -> None:
    """Draws what a request asks for. Emits `started`, a `step` for each state of the trajectory, and at last `done`."""
    run, parsed = opened.checkpoint.run, request.parsed
    program = dataclasses.replace(request.settings, num_steps=1), request.size_of_patterns
    emit("started", {"is_first": program not in opened.compiled})
    begun = time.monotonic()
    is_given = parsed.is_given[: parsed.length]
    before = None
    if (mask_id := run.graph.mask_id) is not None:
        start = np.where(is_given, parsed.tokens[: parsed.length], mask_id)
        before = np.broadcast_to(start, (request.settings.num_samples, parsed.length))
        samples = [pieces.pieces(run, row, is_given, row) for row in before]
        emit("step", {"taken": 0, "total": None, "samples": samples})

    def watch(taken: int, total: int, tokens: Array) -> None:
        nonlocal before
        rows = np.asarray(tokens)[:, : parsed.length]
        last = rows if before is None else before
        samples = [pieces.pieces(run, row, is_given, old) for row, old in zip(rows, last, strict=True)]
        before = rows
        emit("step", {"taken": taken, "total": total, "samples": samples})

    with opened.checkpoint.on_devices():
        drawn = generate.draw_samples(opened.checkpoint, parsed, request.settings, seed=request.seed, watch=watch)
    opened.compiled.add(program)
    facts = {name: getattr(drawn[0], name) for name in ("sampler", "num_steps", "nfe", "draw", "seed", "step")}
    texts = [sample.text for sample in drawn]
    seconds = time.monotonic() - begun
    emit("done", {"texts": texts, **facts, "seconds": seconds, "command": command(opened, request)})


def _takes(run: runs.Run, setting: Setting, value: Any) -> bool:
    """Whether a run takes a value of a setting, all others at their defaults."""
    usual = configs.SamplingConfig(corrector_steps=int(setting.name == "corrector"))
    try:
        run.sampling(**{other.name: getattr(usual, other.name) for other in SETTINGS} | {setting.name: value})
    except errors.UserError:
        return False
    return True


def _parameters(query: str) -> dict[str, str]:
    try:
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict")
    except UnicodeDecodeError as error:
        raise RefusedError(400, "the request is not UTF-8: encode it as browsers do") from error
    except ValueError as error:
        raise RefusedError(400, f"the request cannot be read, {error}: give NAME=VALUE with & between") from error
    names = collections.Counter(name for name, _ in pairs)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise RefusedError(400, f"{repeated[0]} is given twice: give it once")
    return dict(pairs)


def _value(setting: Setting, text: str, kind: Any = None) -> Any:
    """The value of a parameter from its text; `kind` is the type of one that is not a field of the config."""
    kind = kind or _TYPES[setting.name]
    value = _number(text, kind)
    if setting.choices:
        wanted = f"one of {', '.join(str(choice) for choice in setting.choices)}"
        is_fine = value in setting.choices
    else:
        wanted = f"{'a whole number' if kind is int else 'a number'} from {setting.least} to {setting.most}"
        is_fine = value is not text and setting.least <= value <= setting.most
    if not is_fine:
        raise RefusedError(400, f"{setting.name}={_shown(text)} must be {wanted}")
    return value


def _number(text: str, kind: Any) -> Any:
    """The text as an int or float if it is one of that kind; otherwise the text."""
    if kind is int and re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    if kind is float and re.fullmatch(r"[0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18}", text):
        return float(text)
    return text


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _example(run: runs.Run) -> str:
    """A template from the run's held-out text with a gap in its middle half; "" if the run has no such text.

    Of a baseline the gap is all that follows the first quarter.
    """
    try:
        split = run.split("valid")
        length = min(run.config.data.length, split.num_tokens, 96)
        row = split.tokens.read(0, length).astype(np.int32)
        tokenizers.check_encoded(row, run.tokenizer)
    except (errors.UserError, OSError):
        return ""
    quarter = math.ceil(length / 4)
    start, end = run.tokenizer.decode(row[:quarter]), run.tokenizer.decode(row[length - quarter :])
    # Cut at spaces, if there are any.
    start, end = start[: start.rfind(" ") + 1] or start, "" if run.is_autoregressive else end[max(end.find(" "), 0) :]
    gap = length - len(run.tokenizer.encode(start)) - len(run.tokenizer.encode(end))
    start, end = (text.replace("{", "{{").replace("}", "}}") for text in (start, end))
    template = f"{start}{{{gap}}}{end}"
    try:
        templates.parse(run, template)
    except errors.UserError:
        return ""
    return template
