"""Draws texts for a list of templates by continuous batching: a finished slot takes the next template.

`trajectories` runs the slots. The same seed, list and number of slots draw the same texts. The text of one template
also depends on the other templates of the list.
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
from sedd_jax.reverse import steps
from sedd_jax.runtime import errors, terminals
from sedd_jax.sampling import constraints, generate, templates, trajectories

# Sequences shorter than the model's length are padded to this number of tokens, doubled until they fit. So few programs
# are compiled, and every attention kernel supports the lengths.
SHORTEST = 128


# More iterations than ever pass before a text is finished.
FOREVER = 1 << 30


class Drawn(NamedTuple):
    """A finished sequence.

    Attributes:
        index: index of its template in the list.
        tokens: tokens of the text.
        nfe: network evaluations (NFE) that it took part in.
    """

    index: int
    tokens: Int[np.ndarray, "n"]
    nfe: int


class Row(NamedTuple):
    """One template of the list, as the devices get it; see `trajectories.Sequences`."""

    index: int
    tokens: Int[np.ndarray, "L"]
    is_given: Bool[np.ndarray, "L"]
    length: int
    num_steps: int
    places: constraints.Places | None = None


# (template in each slot, which slots are finished, their tokens, iterations taken by each) -> nothing.
TellFn = Callable[[Sequence[Row | None], Any, Any, Any], None]


class Ends(NamedTuple):
    """Where texts end.

    Attributes:
        fit: whether a sequence ends with its template. Otherwise it goes on to the model's length, with tokens that are
            not shown: the model was trained on its full length only.
        stop_at_eos: whether a text is cut before the first end-of-text token that is drawn.
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
    """Draws a text for each template; yields them in the order in which they are finished.

    An autoregressive run draws whole batches instead, and ignores `ends.fit`: tokens after a text cannot change it.

    Args:
        opened: the run.
        asked: templates of the texts.
        settings: how they are drawn; `num_samples` is the number of slots.
        seed: seed of all random numbers.
        ends: where texts end.
        watch: called about 64 times, and when texts are finished, with the arguments that `generate.generate` states;
            its steps are iterations, summed over all texts.

    Raises:
        errors.UserError: where the tokenizer has no end of text to stop at, or a pattern cannot be matched.
    """
    if not asked:
        return
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
    size = None if patterns is None else patterns.automaton.size
    programs = trajectories.make_programs(run.network, rules, size)
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
    """Runs templates of one padded length through the slots of a batch.

    Args:
        programs: compiled programs, see `trajectories.make_programs`.
        inputs: first argument of `advance_fn`.
        key: random key.
        rows: the templates.
        num_slots: number of slots.
        stride: iterations between two calls of `tell`, if no text is finished before.
        tell: called with the template in each slot, which slots are finished, their tokens, and their iterations.

    Yields:
        Each template, its tokens [L], and the iterations that it took, as soon as it is finished.
    """
    key_put, key_iterations = jax.random.split(key)
    length, waiting, iteration = len(rows[0].tokens), iter(rows), jnp.int32(0)
    nobody = trajectories.nobody((num_slots, length), has_patterns=rows[0].places is not None)
    # These keys do not matter: all slots are empty, and `put_fn` draws what starts a sequence.
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
    """The number of tokens to which a sequence is padded: `SHORTEST` doubled until it fits, at most the model's."""
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
        # Padding counts as known, so it is not filled. Its token ids do not matter.
        tokens, is_given = tokens[:padded], is_given[:padded] | (np.arange(padded) >= template.length)
    places = None
    if patterns is not None:
        places = constraints.Places(*(np.asarray(x[index])[:padded] for x in patterns.places))
    num_steps = generate.num_steps_of(run, settings, int((~is_given).sum()))
    return Row(index, tokens, is_given, template.length, num_steps, places)


def _stack(owners: Sequence[Row | None], length: int) -> trajectories.Sequences:
    """The templates as one batch with a sequence for each slot; a slot without a template is empty."""
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
    """The tokens of the text: those that are wanted, up to the first end-of-text token that was drawn."""
    ends = np.flatnonzero((tokens == eos_id) & ~row.is_given)
    return tokens[: min(row.length, *ends[:1])] if len(ends) else tokens[: row.length]


def eos_id_of(run: runs.Run) -> int:
    """Id of the end-of-text token of a run's tokenizer.

    Raises:
        errors.UserError: where the tokenizer has none.
    """
    eos_id = run.tokenizer.eos_id
    if eos_id is None:
        tokenizer = f"{errors.name('config.data.tokenizer')}={run.config.data.tokenizer}"
        raise errors.UserError(
            f"needs an end of text, and {tokenizer} has none", field="stop_at_eos", remedy="leave it out"
        )
    return eos_id


def _teller(run: runs.Run, rows: Sequence[Row], repeats: int, watch: terminals.Watch) -> TellFn:
    """A `TellFn` that reports iterations, summed over all templates, to `watch`.

    A template that is finished early counts with all iterations that it could have taken.
    """
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
