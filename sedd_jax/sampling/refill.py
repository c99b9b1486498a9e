"""Texts for a list of templates by continuous batching: a finished slot takes the next template (`trajectories`).

The same seed, list and number of slots draw the same texts; that of a template alone also depends on its neighbours.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.diffusion import steps
from sedd_jax.runtime import errors, terminals
from sedd_jax.sampling import constraints, generate, templates, trajectories

# Sequences that need not be as long as the model's are padded to this, doubled as often as it takes: few programs, and
# lengths that every kernel of attention takes.
SHORTEST = 128


# Iterations that never pass between two finished texts.
FOREVER = 1 << 30


class Drawn(NamedTuple):
    """A finished sequence.

    Attributes:
        index: of its template.
        tokens: of the text.
        nfe: evaluations that it took part in.
    """

    index: int
    tokens: Int[np.ndarray, "n"]
    nfe: int


class Row(NamedTuple):
    """A template as the devices get it, see `trajectories.Sequences`."""

    index: int
    tokens: Int[np.ndarray, "L"]
    is_given: Bool[np.ndarray, "L"]
    length: int
    num_steps: int
    places: constraints.Places | None = None


# (owners of the slots, which are finished, tokens, iterations taken) -> nothing.
TellFn = Callable[[Sequence[Row | None], Any, Any, Any], None]


class Ends(NamedTuple):
    """Where texts end.

    Attributes:
        fit: whether a sequence ends with its template, instead of going on to the model's length with tokens that are
            not shown. The model was trained on its full length only.
        stop_at_eos: whether a text ends before the first end of text that is drawn.
    """

    fit: bool = False
    stop_at_eos: bool = False


NO_ENDS = Ends()


def draw(
    opened: runs.OpenRun,
    asked: Sequence[templates.Template],
    settings: configs.SamplingConfig,
    *,
    seed: int,
    ends: Ends = NO_ENDS,
    watch: terminals.Watch | None = None,
) -> Iterator[Drawn]:
    """Draws a text for each template, in the order in which they are finished.

    An autoregressive run takes whole batches, and what follows a text does not concern it.

    Args:
        opened: the run.
        asked: what is known of each text.
        settings: how, and in `num_samples` how many at once.
        seed: of everything random.
        ends: where texts end.
        watch: called some 64 times and when texts are finished, as `generate.generate` does; steps are those of all
            texts together.

    Raises:
        errors.UserError: where the tokenizer has no end of text to stop at, or a pattern cannot be matched.
    """
    run = opened.run
    eos_id = eos_id_of(run) if ends.stop_at_eos else None
    patterns = templates.compile_patterns(run, asked)
    generate.refuse_patterns(settings, patterns)
    if run.is_autoregressive:
        yield from _whole_batches(opened, asked, settings, seed, eos_id, watch)
        return
    rows = [_row(run, settings, index, template, ends.fit, patterns) for index, template in enumerate(asked)]
    rows.sort(key=lambda row: -len(row.tokens))
    rules = generate.rules_of(run, settings)._replace(eos_id=eos_id, pads=ends.fit, is_together=False)
    programs = trajectories.make_programs(run.network, rules)
    stride, tell = FOREVER, lambda *_: None
    if watch is not None:
        most = sum(row.num_steps * rules.repeats + 1 for row in rows)
        stride, tell = max(1, most // (64 * settings.num_samples)), _teller(run, rows, rules.repeats, watch)
    inputs = opened.model.params, None if patterns is None else patterns.automaton
    for length, of_length in itertools.groupby(rows, key=lambda row: len(row.tokens)):
        key = jax.random.fold_in(jax.random.key(seed), length)
        drawn = drive(programs, inputs, key, list(of_length), settings.num_samples, stride=stride, tell=tell)
        for row, tokens, iterations in drawn:
            yield Drawn(row.index, _shown(row, tokens, eos_id), generate.per_iteration(run, settings) * iterations)


def drive(
    programs: trajectories.Programs,
    inputs: Any,
    key: jax.Array,
    rows: Sequence[Row],
    num_slots: int,
    *,
    stride: int = FOREVER,
    tell: TellFn = lambda *_: None,
) -> Iterator[tuple[Row, Int[np.ndarray, "L"], int]]:
    """Takes rows of one length through the slots of a batch; each with its tokens and iterations once it is finished.

    Args:
        programs: of `trajectories.make_programs`.
        inputs: the first argument of `advance_fn`.
        key: of everything random.
        rows: the templates.
        num_slots: slots.
        stride: iterations after which to tell of them, even if nothing is finished.
        tell: called with what the slots hold, which of that is finished, its tokens, and the iterations of each.
    """
    key_put, key_iterations = jax.random.split(key)
    length, waiting, iteration = len(rows[0].tokens), iter(rows), jnp.int32(0)
    nobody = trajectories.nobody((num_slots, length), has_patterns=rows[0].places is not None)
    # Nothing of these keys stays: all slots are free.
    slots = programs.begin_fn(jax.random.key(0), jax.random.key(1), nobody)
    owners: list[Row | None] = [None] * num_slots
    is_free = np.ones(num_slots, bool)
    for count in itertools.count():
        owners = [next(waiting, None) if free else owner for owner, free in zip(owners, is_free, strict=True)]
        if not any(owners):
            return
        if is_free.any():
            slots = programs.put_fn(jax.random.fold_in(key_put, count), slots, is_free, _stack(owners, length))
        iteration, slots, finished = programs.advance_fn(inputs, key_iterations, slots, iteration, iteration + stride)
        is_free, xt, taken = np.asarray(finished), np.asarray(slots.batch.xt), np.asarray(slots.batch.iteration)
        tell(owners, is_free, xt, taken)
        for owner, free, tokens, iterations in zip(owners, is_free, xt, taken, strict=True):
            if free and owner is not None:
                yield owner, tokens, int(iterations)


def padded_length(length: int, model_length: int) -> int:
    """The length to which a sequence is padded: `SHORTEST` doubled as often as it takes, at most the model's."""
    padded = SHORTEST
    while padded < length:
        padded *= 2
    return min(padded, model_length)


def _row(
    run: runs.Run,
    settings: configs.SamplingConfig,
    index: int,
    template: templates.Template,
    fit: bool = False,
    patterns: constraints.Patterns | None = None,
) -> Row:
    tokens, is_given, padded = template.tokens, template.is_given, len(template.tokens)
    if fit:
        padded = padded_length(template.length, run.config.data.length)
        # Padding is known, so nothing fills it; which token it is does not matter.
        tokens, is_given = tokens[:padded], is_given[:padded] | (np.arange(padded) >= template.length)
    places = None
    if patterns is not None:
        places = constraints.Places(*(np.asarray(x[index])[:padded] for x in patterns.places))
    num_steps = generate.num_steps_of(run, settings, int((~is_given).sum()))
    return Row(index, tokens, is_given, template.length, num_steps, places)


def _stack(owners: Sequence[Row | None], length: int) -> trajectories.Sequences:
    """What is put into the slots: the rows that own them."""
    nothing = np.zeros(length, bool)
    nowhere = constraints.Places(np.full(length, -1, np.int32), nothing, nothing)
    nobody = Row(-1, np.zeros(length, np.int32), ~nothing, 0, 0)
    rows = [owner or nobody for owner in owners]
    places = None
    if any(row.places is not None for row in rows):
        places = jax.tree.map(lambda *x: np.stack(x), *(row.places or nowhere for row in rows))
    return trajectories.Sequences(
        given=steps.Given(
            jnp.asarray(np.stack([row.tokens for row in rows]), jnp.int32),
            jnp.asarray(np.stack([row.is_given for row in rows])),
        ),
        lengths=np.array([row.length for row in rows], np.int32),
        num_steps=np.array([row.num_steps for row in rows], np.int32),
        is_busy=np.array([owner is not None for owner in owners]),
        places=places,
    )


def _shown(row: Row, tokens: Int[np.ndarray, "L"], eos_id: int | None) -> Int[np.ndarray, "n"]:
    """The tokens that are asked for, up to the first end of text that is drawn."""
    ends = np.flatnonzero((tokens == eos_id) & ~row.is_given)
    return tokens[: min(row.length, *ends[:1])] if len(ends) else tokens[: row.length]


def eos_id_of(run: runs.Run) -> int:
    """The end of text of a run's tokenizer.

    Raises:
        errors.UserError: where it has none.
    """
    eos_id = run.tokenizer.eos_id
    if eos_id is None:
        tokenizer = f"{errors.name('config.data.tokenizer')}={run.config.data.tokenizer}"
        raise errors.UserError(
            f"needs an end of text, and {tokenizer} has none", field="stop_at_eos", remedy="leave it out"
        )
    return eos_id


def _teller(run: runs.Run, rows: Sequence[Row], repeats: int, watch: terminals.Watch) -> TellFn:
    """Tells a watcher of the steps of all rows; one that is finished early has taken all of its own."""
    of_row = lambda row: row.num_steps * repeats + 1
    total, before = sum(map(of_row, rows)), 0

    def tell(owners, is_finished, xt, taken) -> None:
        nonlocal before
        busy = [(owner, *state) for owner, *state in zip(owners, is_finished, xt, taken, strict=True) if owner]
        before += sum(of_row(owner) for owner, finished, *_ in busy if finished)
        running = sum(int(number) for _, finished, _, number in busy if not finished)
        bodies = lambda: [generate.texts(run, tokens[None], owner.length)[0] for owner, _, tokens, _ in busy]
        watch(before + running, total, bodies)

    return tell


def _whole_batches(
    opened: runs.OpenRun,
    asked: Sequence[templates.Template],
    settings: configs.SamplingConfig,
    seed: int,
    eos_id: int | None,
    watch: terminals.Watch | None,
) -> Iterator[Drawn]:
    run, length = opened.run, opened.run.config.data.length
    num_batches = -(-len(asked) // settings.num_samples)
    rows = [_row(run, settings, index, template) for index, template in enumerate(asked)]
    tokens, is_given = np.stack([row.tokens for row in rows]), np.stack([row.is_given for row in rows])
    waiting = iter(rows)
    for number, batch in enumerate(generate.draw_batches(opened, tokens, is_given, settings, seed=seed), start=1):
        for drawn in batch:
            row = next(waiting)
            yield Drawn(row.index, _shown(row, drawn, eos_id), length)
        if watch is not None:
            watch(number * length, num_batches * length, functools.partial(generate.texts, run, batch, length))
