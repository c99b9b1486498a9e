"""Draws text from a run: from nothing, or around given text."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.model import autoregression, sampling_config
from sedd_jax.reverse import steps
from sedd_jax.runtime import errors, storage, terminals
from sedd_jax.sampling import constraints, templates, trajectories

# (steps taken, total steps, tokens so far) -> nothing.
WatchTokens = Callable[[int, int, Int[Array, "B L"]], None]
# network evaluations that each sequence took -> nothing.
CountFn = Callable[[Int[np.ndarray, "B"]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One drawn text, and how it was drawn.

    Attributes:
        text: the text.
        tokens: its token ids.
        seed: seed of all random numbers.
        index: its number among the texts of one call, from 0.
        step: training step of the checkpoint.
        checksum: of the checkpoint's weights, see `runs.OpenRun.checksum`; None in files of earlier versions.
        sampler: name of the sampler.
        num_steps: reverse steps, without the last evaluation.
        nfe: network evaluations (NFE), with the last one.
        draw: precision of the sampling noise.
        refinements: the values of `sampling_config.REFINEMENTS`.
        fit: whether the sequence ends with its template, instead of at the model's length.
        stop_at_eos: whether the text was cut at the first end-of-text token that was drawn.
        prompt: the prompt as it was given in a file of prompts; None if there is no file.
    """

    text: str
    tokens: list[int]
    seed: int
    index: int
    step: int
    sampler: str
    num_steps: int
    nfe: int
    draw: str
    refinements: dict[str, Any]
    fit: bool = False
    stop_at_eos: bool = False
    prompt: dict[str, str] | None = None
    checksum: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as one flat dict for JSON, each refinement a field of its own."""
        fields = {}
        for name, value in dataclasses.asdict(self).items():
            fields |= value if name == "refinements" else {name: value}
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Sample":
        """The sample that `to_dict` wrote.

        Raises:
            TypeError: where the fields are not those of a sample.
        """
        refinements = {name: value for name, value in fields.items() if name in sampling_config.REFINEMENTS}
        others = {name: value for name, value in fields.items() if name not in sampling_config.REFINEMENTS}
        return cls(**others, refinements=refinements)

    @property
    def annealing(self) -> str:
        """The settings that lower its entropy on purpose, such as "top_p=0.9"; "" if there are none."""
        names = ("temperature", "top_p")
        return ", ".join(f"{name}={self.refinements[name]}" for name in names if self.refinements[name] < 1)


def generate(
    workdir: storage.Directory,
    written: templates.Written,
    *,
    step: int | None = None,
    seed: int = 0,
    watch: terminals.Watch | None = None,
    **settings: Any,
) -> list[Sample]:
    """Draws texts from a checkpoint of a run, with the moving average (EMA) of its parameters.

    Args:
        workdir: the run directory.
        written: what is known of the texts.
        step: training step of the checkpoint; the newest if None.
        seed: seed of all random numbers; the same seed draws the same texts.
        watch: called about 64 times with the steps taken, the total steps, and a function that returns the texts so
            far, in which masks are shown as `░`.
        **settings: fields of `config.SamplingConfig` that differ from the run's.

    Raises:
        errors.UserError: where the run, the checkpoint, the template or a setting cannot be used.
    """
    run = runs.load(workdir)
    changed = run.sampling(**settings)
    template = templates.read(run, written)
    opened = run.restore(step)
    with opened.on_devices():
        show = None if watch is None else as_text(run, template.length, watch)
        return draw_samples(opened, template, changed, seed=seed, watch=show)


def draw_samples(
    opened: runs.OpenRun,
    template: templates.Template,
    settings: configs.SamplingConfig,
    *,
    seed: int,
    watch: WatchTokens | None = None,
) -> list[Sample]:
    """Draws `settings.num_samples` texts that agree with the template, as one batch.

    Args:
        opened: the run.
        template: known tokens and gaps.
        settings: number of texts, and how they are drawn.
        seed: seed of all random numbers; the same seed draws the same texts.
        watch: see `draw_tokens`.

    Raises:
        errors.UserError: where a pattern of the template cannot be matched, or the run or the settings allow none.
    """
    run, shape = opened.run, (settings.num_samples, len(template.tokens))
    given = steps.Given(
        jnp.broadcast_to(jnp.asarray(template.tokens, jnp.int32), shape), jnp.broadcast_to(template.is_given, shape)
    )
    patterns = templates.compile_patterns(run, [template] * settings.num_samples)
    taken: list[int] = []
    count = lambda nfe: taken.extend(nfe.tolist())
    tokens = draw_tokens(opened, given, settings, seed=seed, patterns=patterns, watch=watch, count=count)
    num_gaps = int((~template.is_given).sum())
    return [
        Sample(
            text=run.tokenizer.decode(row),
            tokens=row.tolist(),
            seed=seed,
            index=index,
            step=opened.step,
            checksum=opened.checksum,
            nfe=taken[index],
            **circumstances(run, settings, num_gaps),
        )
        for index, row in enumerate(tokens[:, : template.length])
    ]


def as_text(run: runs.Run, length: int, watch: terminals.Watch) -> WatchTokens:
    """A watcher of tokens that passes the first `length` tokens of each sequence on to `watch`, as texts."""
    return lambda taken, total, tokens: watch(taken, total, functools.partial(texts, run, tokens, length))


def circumstances(run: runs.Run, settings: configs.SamplingConfig, num_gaps: int) -> dict[str, Any]:
    """The fields of a `Sample` that say how a sequence with `num_gaps` tokens to fill is drawn."""
    return {
        "sampler": sampler_name(run, settings),
        "num_steps": num_steps_of(run, settings, num_gaps),
        "draw": settings.draw,
        "refinements": sampling_config.refinements(settings),
    }


def sampler_name(run: runs.Run, settings: configs.SamplingConfig) -> str:
    """Name of the sampler in results; "autoregressive" for the baseline, which has a sampler of its own."""
    return configs.AUTOREGRESSIVE if run.is_autoregressive else settings.sampler


def num_evaluations(run: runs.Run, settings: configs.SamplingConfig, num_gaps: int | None = None) -> int:
    """Network evaluations (NFE) to fill `num_gaps` tokens (all of them if None), the last one included.

    A sampler that is adaptive may take fewer; see `draw_tokens`.
    """
    before_last = per_step(run, settings) * num_steps_of(run, settings, num_gaps)
    return before_last + (1 if settings.guidance == 1 else 2)


def per_step(run: runs.Run, settings: configs.SamplingConfig) -> int:
    """Network evaluations of a step together with its corrector steps."""
    return per_iteration(run, settings) * (1 + run.sampler(settings).corrector_steps)


def per_iteration(run: runs.Run, settings: configs.SamplingConfig) -> int:
    """Network evaluations of an iteration that is not the last: those of the sampler, twice as many with guidance."""
    return run.sampler(settings).traits.evaluations * (1 if settings.guidance == 1 else 2)


def num_steps_of(run: runs.Run, settings: configs.SamplingConfig, num_gaps: int | None) -> int:
    """Reverse steps before the last evaluation, to fill `num_gaps` tokens (all of them if None)."""
    return run.sampler(settings).num_steps(settings.num_steps, run.config.data.length if num_gaps is None else num_gaps)


def draw_tokens(
    opened: runs.OpenRun,
    given: steps.Given,
    settings: configs.SamplingConfig,
    *,
    seed: int,
    patterns: constraints.Patterns | None = None,
    watch: WatchTokens | None = None,
    count: CountFn | None = None,
) -> Int[np.ndarray, "B L"]:
    """Draws sequences that agree with the known tokens of each, as one batch.

    Args:
        opened: the run.
        given: known tokens of each sequence.
        settings: how they are drawn; `num_evaluations` says what that costs.
        seed: seed of all random numbers; the same seed draws the same tokens.
        patterns: patterns that the text of gaps must match; None if there are none.
        watch: called about 64 times with the steps taken, the total steps, and the tokens so far.
        count: called once with the network evaluations that each sequence took.

    Raises:
        errors.UserError: where an autoregressive run is given tokens after a gap, or the draws allow no patterns.
    """
    run = opened.run
    if run.is_autoregressive:
        autoregression.refuse_text_after_gaps(np.asarray(given.is_given))
    refuse_patterns(settings, patterns)
    num_gaps = int((~np.asarray(given.is_given)).sum(1).max())
    num_steps = num_steps_of(run, settings, num_gaps)
    rules = rules_of(run, settings)
    size = None if patterns is None else patterns.automaton.size
    programs = trajectories.make_programs(run.network, rules, size)
    inputs = opened.model.params, None if patterns is None else patterns.automaton
    key_limit, key_steps, key_last = jax.random.split(jax.random.key(seed), 3)
    slots = programs.begin_fn(key_limit, key_steps, together(given, num_steps, patterns))
    # A watched trajectory runs in parts. Keys depend on the step only, so the text is the same.
    stride = max(1, num_steps // 64 if watch else num_steps)
    for start in range(0, num_steps, stride):
        stop = min(start + stride, num_steps)
        _, slots, _ = programs.advance_fn(inputs, key_steps, slots, start * rules.repeats, stop * rules.repeats)
        if watch:
            watch(stop, num_steps + 1, given.clamp(jax.block_until_ready(slots.batch.xt)))
    if count:
        count(_evaluations_taken(run, settings, slots.batch, num_gaps))
    tokens = programs.finish_fn(inputs, key_steps, key_last, slots)
    if watch:
        watch(num_steps + 1, num_steps + 1, tokens)
    return np.asarray(tokens)


def _evaluations_taken(
    run: runs.Run, settings: configs.SamplingConfig, batch: steps.Batch, num_gaps: int
) -> Int[np.ndarray, "B"]:
    """Network evaluations of each sequence, with the last one, which is all that `batch` still lacks."""
    if not run.sampler(settings).traits.is_adaptive:
        return np.full(len(batch.xt), num_evaluations(run, settings, num_gaps))
    is_left = np.asarray(batch.given.is_movable(run.graph, batch.xt)).any(1)
    return per_iteration(run, settings) * np.maximum(1, np.asarray(batch.iteration) + is_left)


def rules_of(run: runs.Run, settings: configs.SamplingConfig) -> trajectories.Rules:
    """The rules by which a plain batch of a run is filled."""
    return trajectories.Rules(
        process=run.process,
        sampler=run.sampler(settings),
        control=sampling_config.make_control(settings),
        draw=settings.draw,
        is_together=True,
    )


def together(
    given: steps.Given, num_steps: int, patterns: constraints.Patterns | None = None
) -> trajectories.Sequences:
    """A plain batch: all sequences take `num_steps` steps, and all of their tokens are wanted."""
    num_sequences, length = given.tokens.shape
    each = lambda value: np.full(num_sequences, value, np.int32)
    places = None if patterns is None else patterns.places
    return trajectories.Sequences(given, each(length), each(num_steps), np.ones(num_sequences, bool), places)


def draw_batches(
    opened: runs.OpenRun,
    tokens: Int[np.ndarray, "S L"],
    is_given: Bool[np.ndarray, "S L"],
    settings: configs.SamplingConfig,
    *,
    seed: int,
    count: CountFn | None = None,
) -> Iterator[Int[np.ndarray, "B L"]]:
    """Draws S sequences that agree with the given tokens of each, in batches of `settings.num_samples`.

    Each batch is drawn by `draw_tokens`, with a seed that follows from `seed` and the number of the batch.
    `count` is called for every batch.
    """
    size = settings.num_samples
    for number, start in enumerate(range(0, len(tokens), size)):
        # The last batch is filled up with other sequences, so that no second shape is compiled.
        rows = np.arange(start, start + size) % len(tokens)
        (own,) = np.random.SeedSequence([seed, number]).generate_state(1).tolist()
        given = steps.Given(jnp.asarray(tokens[rows]), jnp.asarray(is_given[rows]))
        num_own = len(tokens) - start
        own_count = None if count is None else lambda nfe, num_own=num_own: count(nfe[:num_own])
        yield draw_tokens(opened, given, settings, seed=own, count=own_count)[:num_own]


def refuse_patterns(settings: configs.SamplingConfig, patterns: constraints.Patterns | None) -> None:
    """Raises errors.UserError where there are patterns and `settings.draw` does not support them."""
    if patterns is not None and settings.draw != "precise":
        raise errors.UserError(
            "takes no patterns", field="config.sampling.draw", value=settings.draw, remedy="set it to precise"
        )


def to_line(sample: Sample) -> str:
    """The sample as one line of JSON: text, token ids, and how they were drawn."""
    return json.dumps(sample.to_dict(), ensure_ascii=False) + "\n"


def write_jsonl(samples: list[Sample], path: pathlib.Path) -> None:
    """Writes the samples to a file, one `to_line` each. Another file of this name is replaced by the whole one."""
    content = "".join(map(to_line, samples))
    if path.exists() and not path.is_file():  # Such as /dev/stdout.
        path.write_text(content, encoding="utf-8")
        return
    storage.replace_text(path, content)


def texts(run: runs.Run, tokens: Int[Array | np.ndarray, "B L"], length: int) -> list[str]:
    """The first `length` tokens of each sequence as text; each mask is shown as `░`."""
    return ["".join(_pieces(run, row)) for row in np.asarray(tokens)[:, :length]]


def is_mask(run: runs.Run, row: Int[np.ndarray, "L"]) -> Bool[np.ndarray, "L"]:
    """Where a sequence has masks; nowhere if the graph has none."""
    return row == (run.graph.mask_id if run.graph.has_mask else -1)


def _pieces(run: runs.Run, row: Int[np.ndarray, "L"]) -> Iterator[str]:
    """Parts of the text of one sequence: stretches of tokens, and a `░` for each mask."""
    masked = is_mask(run, row)
    borders = np.flatnonzero(np.diff(masked)) + 1
    for stretch in np.split(np.arange(len(row)), borders):
        if len(stretch):
            yield "░" * len(stretch) if masked[stretch[0]] else run.tokenizer.decode(row[stretch])
