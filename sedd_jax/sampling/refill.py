"""Texts for a list of templates, on a batch whose places are filled again as soon as a text is finished (`slots`).

The same seed, list and number of places draw the same texts; that of a template alone also depends on its neighbours.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.diffusion import samplers
from sedd_jax.model import networks
from sedd_jax.runtime import sharding, terminals
from sedd_jax.sampling import constraints, generate, moves, slots, templates

# Sequences that need not be as long as the model's are padded to this, doubled as often as it takes: few programs, and
# lengths that every kernel of attention takes.
SHORTEST = 128


# Turns that never pass between two finished texts.
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


class Programs(NamedTuple):
    """What runs on the devices.

    Attributes:
        empty_fn: (number of places, their length, whether there are patterns) -> as `slots.empty`.
        put_fn: `slots.put` without its rules.
        advance_fn: ((parameters, patterns' automaton), key, slots, start, stop) -> as `slots.advance`.
    """

    empty_fn: Callable[..., slots.Slots]
    put_fn: Callable[..., slots.Slots]
    advance_fn: Callable[..., tuple[Array, slots.Slots, Array]]


class Row(NamedTuple):
    """A template as the devices get it, see `slots.Slots`."""

    index: int
    tokens: Int[np.ndarray, "L"]
    is_given: Bool[np.ndarray, "L"]
    length: int
    num_steps: int
    places: constraints.Places | None = None


# (owners of the places, which are finished, tokens, turns taken) -> nothing.
TellFn = Callable[[Sequence[Row | None], Any, Any, Any], None]


def draw(
    run: runs.Run,
    params: networks.Params,
    asked: Sequence[templates.Template],
    settings: configs.SamplingConfig,
    *,
    seed: int,
    fit: bool = False,
    stop_at_eos: bool = False,
    watch: terminals.Watch | None = None,
) -> Iterator[Drawn]:
    """Draws a text for each template, in the order in which they are finished.

    An autoregressive run takes whole batches, and what follows a text does not concern it.

    Args:
        run: the run.
        params: parameters, usually the moving average.
        asked: what is known of each text.
        settings: how, and in `num_samples` how many at once.
        seed: of everything random.
        fit: whether a sequence ends with its template, instead of going on to the model's length with tokens that are
            not shown. The model was trained on its full length only.
        stop_at_eos: whether a text ends before the first end of text that is drawn.
        watch: called some 64 times and when texts are finished, as `generate.draw_samples` does; steps are those of all
            texts together.

    Raises:
        ValueError: where the tokenizer has no end of text to stop at, or a pattern cannot be matched.
    """
    eos_id = eos_id_of(run) if stop_at_eos else None
    matched = templates.compile_patterns(run, asked)
    generate.refuse_patterns(settings, matched)
    if run.is_autoregressive:
        yield from _whole_batches(run, params, asked, settings, seed, eos_id, watch)
        return
    rows = [_row(run, settings, index, template, fit, matched) for index, template in enumerate(asked)]
    rows.sort(key=lambda row: -len(row.tokens))
    rules = slots.Rules(run.graph, run.noise, dataclasses.replace(settings, num_steps=1, num_samples=1), eos_id)
    programs = make_programs(run.network, rules, pads=fit)
    stride, tell = FOREVER, lambda *_: None
    if watch is not None:
        most = sum(row.num_steps * rules.turns + 1 for row in rows)
        stride, tell = max(1, most // (64 * settings.num_samples)), _teller(run, rows, rules.turns, watch)
    inputs = params, None if matched is None else matched.automaton
    for length, of_length in itertools.groupby(rows, key=lambda row: len(row.tokens)):
        key = jax.random.fold_in(jax.random.key(seed), length)
        drawn = drive(programs, inputs, key, list(of_length), settings.num_samples, stride=stride, tell=tell)
        for row, tokens, turns in drawn:
            yield Drawn(row.index, _shown(row, tokens, eos_id), generate.per_turn(settings) * turns)


def drive(
    programs: Programs,
    inputs: Any,
    key: Key[Array, ""],
    rows: Sequence[Row],
    num_slots: int,
    *,
    stride: int = FOREVER,
    tell: TellFn = lambda *_: None,
) -> Iterator[tuple[Row, Int[np.ndarray, "L"], int]]:
    """Takes rows of one length through the places of a batch; each with its tokens and turns once it is finished.

    Args:
        programs: of `make_programs`.
        inputs: the first argument of `advance_fn`.
        key: of everything random.
        rows: the templates.
        num_slots: places.
        stride: turns after which to tell of them, even if nothing is finished.
        tell: called with what the places hold, which of that is finished, its tokens, and the turns of each.
    """
    key_put, key_turns = jax.random.split(key)
    length = len(rows[0].tokens)
    state, turn, waiting = programs.empty_fn(num_slots, length, rows[0].places is not None), jnp.int32(0), iter(rows)
    owners: list[Row | None] = [None] * num_slots
    is_free = np.ones(num_slots, bool)
    for count in itertools.count():
        owners = [next(waiting, None) if free else owner for owner, free in zip(owners, is_free, strict=True)]
        if not any(owners):
            return
        if is_free.any():
            state = programs.put_fn(jax.random.fold_in(key_put, count), state, is_free, *_stack(owners, length))
        turn, state, finished = programs.advance_fn(inputs, key_turns, state, turn, turn + stride)
        is_free, xt, turns = np.asarray(finished), np.asarray(state.xt), np.asarray(state.number)
        tell(owners, is_free, xt, turns)
        for owner, free, tokens, taken in zip(owners, is_free, xt, turns, strict=True):
            if free and owner is not None:
                yield owner, tokens, int(taken)


def make_programs(network: networks.NetworkConfig, rules: slots.Rules, *, pads: bool) -> Programs:
    """The programs of a network, compiled once for each number of places and length.

    Args:
        network: sizes.
        rules: how sequences are filled.
        pads: whether nobody attends to what follows a sequence's own length.
    """
    return _make_programs(network, rules, pads)


@functools.cache
def _make_programs(network: networks.NetworkConfig, rules: slots.Rules, pads: bool) -> Programs:
    control = configs.make_control(rules.settings)

    def model(inputs: tuple[networks.Params, constraints.Automaton | None], state: slots.Slots) -> slots.Model:
        params, automaton = inputs
        matched = None if automaton is None or state.places is None else moves.Patterns(automaton, state.places)
        # A place that is empty, or waits to be emptied, has no tokens, but attention needs one.
        lengths = jnp.maximum(state.lengths, 1) if pads else None
        mover = moves.Mover(network, params, rules.graph, state.given, matched, control, rules.settings.draw, lengths)
        return slots.Model(mover.evaluate, mover.draw_from, mover.leap)

    def advance(inputs, key, state, start, stop):
        # Every process holds all of it, and all decide alike.
        return _whole(slots.advance(key, rules, functools.partial(model, inputs), state, start, stop))

    return Programs(
        empty_fn=lambda *shape: slots.empty(rules, shape[:2], has_patterns=shape[2]),
        put_fn=jax.jit(lambda key, state, *new: _whole(slots.put(key, rules, state, *new))),
        advance_fn=jax.jit(advance),
    )


def _whole(tree: Any) -> Any:
    return jax.tree.map(sharding.replicate, tree)


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
    matched: moves.Patterns | None = None,
) -> Row:
    tokens, is_given, padded = template.tokens, template.is_given, len(template.tokens)
    if fit:
        padded = padded_length(template.length, run.config.data.length)
        # Padding is known, so nothing fills it; which token it is does not matter.
        tokens, is_given = tokens[:padded], is_given[:padded] | (np.arange(padded) >= template.length)
    places = None if matched is None else constraints.Places(*(np.asarray(x[index])[:padded] for x in matched.places))
    num_steps = generate.num_steps_of(run, settings, int((~is_given).sum()))
    return Row(index, tokens, is_given, template.length, num_steps, places)


def _stack(owners: Sequence[Row | None], length: int) -> tuple[Any, ...]:
    """What `slots.put` takes for all places."""
    nothing = np.zeros(length, bool)
    nowhere = constraints.Places(np.full(length, -1, np.int32), nothing, nothing)
    nobody = Row(-1, np.zeros(length, np.int32), ~nothing, 0, 0)
    rows = [owner or nobody for owner in owners]
    lengths, num_steps = (np.array(x, np.int32) for x in zip(*(row[3:5] for row in rows), strict=True))
    places = None
    if any(row.places is not None for row in rows):
        places = jax.tree.map(lambda *x: np.stack(x), *(row.places or nowhere for row in rows))
    return _given(rows), lengths, num_steps, np.array([owner is not None for owner in owners]), places


def _given(rows: Sequence[Row]) -> samplers.Given:
    tokens, is_given = (np.stack(x) for x in zip(*(row[1:3] for row in rows), strict=True))
    return samplers.Given(jnp.asarray(tokens, jnp.int32), jnp.asarray(is_given))


def _shown(row: Row, tokens: Int[np.ndarray, "L"], eos_id: int | None) -> Int[np.ndarray, "n"]:
    """The tokens that are asked for, up to the first end of text that is drawn."""
    ends = np.flatnonzero((tokens == eos_id) & ~row.is_given)
    return tokens[: min(row.length, *ends[:1])] if len(ends) else tokens[: row.length]


def eos_id_of(run: runs.Run) -> int:
    """The end of text of a run's tokenizer.

    Raises:
        ValueError: where it has none.
    """
    eos_id = run.tokenizer.eos_id
    if eos_id is None:
        spec = run.config.data.tokenizer
        raise ValueError(f"--stop_at_eos needs an end of text, and config.data.tokenizer={spec} has none: leave it out")
    return eos_id


def _teller(run: runs.Run, rows: Sequence[Row], turns: int, watch: terminals.Watch) -> TellFn:
    """Tells a watcher of the steps of all rows; one that is finished early has taken all of its own."""
    of_row = lambda row: row.num_steps * turns + 1
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
    run: runs.Run,
    params: networks.Params,
    asked: Sequence[templates.Template],
    settings: configs.SamplingConfig,
    seed: int,
    eos_id: int | None,
    watch: terminals.Watch | None,
) -> Iterator[Drawn]:
    length = run.config.data.length
    num_batches = -(-len(asked) // settings.num_samples)
    rows = [_row(run, settings, index, template) for index, template in enumerate(asked)]
    tokens, is_given = np.stack([row.tokens for row in rows]), np.stack([row.is_given for row in rows])
    waiting = iter(rows)
    for number, batch in enumerate(generate.draw_batches(run, params, tokens, is_given, settings, seed=seed), start=1):
        for drawn in batch:
            row = next(waiting)
            yield Drawn(row.index, _shown(row, drawn, eos_id), length)
        if watch is not None:
            watch(number * length, num_batches * length, functools.partial(generate.texts, run, batch, length))
