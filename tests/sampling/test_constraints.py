"""Gaps with a pattern are drawn from their joint distribution, whatever is known and however unlikely a match is."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd_jax.data import alphabets
from sedd_jax.diffusion import graphs
from sedd_jax.sampling import constraints, patterns
from tests.support import oracles

LETTERS = "abcd"
TOKENIZER = alphabets.Characters(alphabet=LETTERS)
GRAPH = graphs.Absorbing(vocab_size=4, mask_id=4)
NUM_DRAWS = 20_000
# Gaps of the three sequences of a batch. The first two have two gaps each, the third has one gap of full length.
ROWS = (
    (patterns.Gap(1, 3, "a*(b|cc)"), patterns.Gap(5, 2, "(ab|ba|[cd]d)+")),
    (patterns.Gap(0, 2, "(ab|ba|[cd]d)+"), patterns.Gap(2, 3, "a*(b|cc)")),
    (patterns.Gap(0, 7, "(a[bc])*d+[^a]"),),
)
LENGTH = 7


@pytest.fixture(scope="module")
def compiled():
    return patterns.compile([gap.pattern for row in ROWS for gap in row], TOKENIZER, GRAPH)


@pytest.fixture(scope="module")
def choose():
    return jax.jit(constraints.choose_classes)


def _stack(rows, automaton, initial, length=LENGTH) -> constraints.Places:
    return jax.tree.map(lambda *x: np.stack(x), *[patterns.place(row, length, automaton, initial) for row in rows])


def _draws(choose, automaton, places, log_weights, num_draws=NUM_DRAWS, seed=0) -> np.ndarray:
    """Many draws of each sequence, [num_draws, B, L], all made in one batch."""
    tile = lambda x: jnp.repeat(jnp.asarray(x), num_draws, axis=0)
    classes = choose(jax.random.key(seed), tile(log_weights), automaton, jax.tree.map(tile, places))
    return np.asarray(classes).reshape(len(log_weights), num_draws, -1).swapaxes(0, 1)


def _letters(automaton) -> list[str]:
    """The letters of each class."""
    classes = automaton.class_of[: len(LETTERS)]
    return [
        "".join(letter for letter, k in zip(LETTERS, classes, strict=True) if k == n) for n in range(max(classes) + 1)
    ]


def _distribution(gap: patterns.Gap, automaton, log_weights) -> dict[tuple[int, ...], float]:
    """The probability of every sequence of classes of a gap, by enumeration in float64."""
    letters = _letters(automaton)
    distribution = {}
    for classes in itertools.product([k for k, text in enumerate(letters) if text], repeat=gap.length):
        if re.fullmatch(gap.pattern, "".join(letters[k][0] for k in classes)):
            terms = [float(log_weights[gap.start + i, k]) for i, k in enumerate(classes)]
            if min(terms) > -np.inf:
                distribution[classes] = sum(terms)
    highest = max(distribution.values())
    distribution = {classes: np.exp(log - highest) for classes, log in distribution.items()}
    return {classes: weight / sum(distribution.values()) for classes, weight in distribution.items()}


def _assert_follows(draws, gaps, automaton, log_weights) -> None:
    """Gaps of a sequence are independent of each other, so their joint distribution is the product."""
    distributions = [_distribution(gap, automaton, log_weights) for gap in gaps]
    outcomes = list(itertools.product(*distributions))
    number = {sum(parts, ()): n for n, parts in enumerate(outcomes)}
    places = [position for gap in gaps for position in range(gap.start, gap.start + gap.length)]
    counts = np.bincount([number[tuple(draw)] for draw in draws[:, places].tolist()], minlength=len(outcomes))
    probabilities = np.array(
        [
            np.prod([distribution[part] for distribution, part in zip(distributions, parts, strict=True)])
            for parts in outcomes
        ]
    )
    assert oracles.chi_square_p(counts, probabilities) > 1e-4
    assert (draws[:, sorted(set(range(draws.shape[1])) - set(places))] == -1).all()


def test_classes_follow_their_joint_distribution(compiled, choose):
    """Two gaps in a sequence, adjacent gaps, and different patterns in each sequence."""
    automaton, initial = compiled
    log_weights = 2 * np.random.default_rng(0).normal(size=(3, LENGTH, automaton.num_classes)).astype(np.float32)
    draws = _draws(choose, automaton, _stack(ROWS, automaton, initial), log_weights)
    for row, gaps in enumerate(ROWS):
        _assert_follows(draws[:, row], gaps, automaton, log_weights[row])


def test_states_that_nothing_reaches_change_no_draw(compiled, choose):
    """Patterns of many sizes share programs, and draw what each drew in a program of its own."""
    automaton, initial = compiled
    padded = constraints.pad(automaton)
    assert padded.size == (32, automaton.num_classes)
    assert constraints.pad(padded).size == padded.size
    log_weights = np.random.default_rng(1).normal(size=(3, LENGTH, automaton.num_classes), scale=3).astype(np.float32)
    log_weights[..., 0] = -np.inf
    places = _stack(ROWS, automaton, initial)
    drawn = [_draws(choose, which, places, log_weights, num_draws=500) for which in (automaton, padded)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] >= 0).any()


def test_known_tokens_are_kept_and_the_rest_follows(compiled, choose):
    """One token of each gap is known. Known tokens outside of a gap do not influence it."""
    automaton, initial = compiled
    log_weights = np.random.default_rng(1).normal(size=(3, LENGTH, automaton.num_classes)).astype(np.float32)
    xt = np.array([TOKENIZER.encode(text) for text in ("dacabdd", "baadaaa", "aaaadaa")])
    is_known = np.array([[c == "1" for c in row] for row in ("1100101", "0110011", "0000100")])
    pinned = np.asarray(constraints.pin(jnp.asarray(log_weights), automaton, jnp.asarray(xt), jnp.asarray(is_known)))
    places = _stack(ROWS, automaton, initial)
    draws = _draws(choose, automaton, places, pinned, seed=1)
    for row, gaps in enumerate(ROWS):
        _assert_follows(draws[:, row], gaps, automaton, pinned[row])
    kept = is_known & places.is_constrained
    assert (draws[:, kept] == automaton.class_of[xt[kept]][None]).all()
    assert len(set(map(tuple, draws[:, 2].tolist()))) > 1


@pytest.mark.parametrize("log_odds", [-69.0, -1e3, -3e38])
def test_unlikely_classes_still_match(compiled, choose, log_odds):
    """At every position the classes that the pattern needs have almost no weight: less than float32 can hold."""
    automaton, initial = compiled
    k = automaton.class_of[TOKENIZER.encode(LETTERS)]
    log_weights = np.zeros((3, LENGTH, automaton.num_classes), np.float32)
    log_weights[0, :, k[0]] = log_weights[0, :, k[1]] = log_weights[0, :, k[2]] = log_odds
    log_weights[1, :, k[1]] = log_weights[1, :, k[3]] = log_odds
    log_weights[2, :, k[3]] = log_weights[2, :, k[0]] = log_odds
    draws = _draws(choose, automaton, _stack(ROWS, automaton, initial), log_weights, num_draws=200)
    letters = _letters(automaton)
    for row, gaps in enumerate(ROWS):
        for gap in gaps:
            for draw in draws[:, row, gap.start : gap.start + gap.length]:
                assert re.fullmatch(gap.pattern, "".join(letters[n][0] for n in draw))


def test_odds_are_right_where_all_are_small(choose):
    """If all paths weigh e^-1000 or less, their relative weights decide."""
    pattern = "a{5}|b{5}|c{5}"
    automaton, initial = patterns.compile([pattern], TOKENIZER, GRAPH)
    k = automaton.class_of[TOKENIZER.encode(LETTERS)]
    log_weights = np.zeros((1, 5, automaton.num_classes), np.float32)
    log_weights[0, :, k[:3]] = np.array([-200.0, -200.1, -230.0])[:, None]
    gap = patterns.Gap(0, 5, pattern)
    draws = _draws(choose, automaton, _stack([[gap]], automaton, initial, 5), log_weights)
    _assert_follows(draws[:, 0], [gap], automaton, log_weights[0])


def test_a_long_gap_keeps_its_odds(choose):
    """With a thousand positions that weigh e^-1000 each, odds of e^0.06 still have their effect."""
    pattern = "(aa|bb)*"
    automaton, initial = patterns.compile([pattern], TOKENIZER, GRAPH)
    a, b, _, _ = automaton.class_of[TOKENIZER.encode(LETTERS)]
    log_weights = np.zeros((1, 1000, automaton.num_classes), np.float32)
    log_weights[..., a], log_weights[..., b] = -1000.0, -1000.03
    places = _stack([[patterns.Gap(0, 1000, pattern)]], automaton, initial, 1000)
    draws = _draws(choose, automaton, places, log_weights, num_draws=400)
    assert (draws[..., ::2] == draws[..., 1::2]).all()
    is_a = (draws[..., ::2] == a).mean()
    assert is_a == pytest.approx(1 / (1 + np.exp(-0.06)), abs=5 * 0.5 / np.sqrt(400 * 500))


def test_constants_do_not_matter(compiled, choose):
    """A constant added to all log weights of a position changes no draw."""
    automaton, initial = compiled
    places = _stack(ROWS, automaton, initial)
    log_weights = np.random.default_rng(3).integers(-64, 64, (3, LENGTH, automaton.num_classes)) / np.float32(16)
    shifts = np.array([0.0, -(2.0**15), 2.0**10, -64, 0, -(2.0**15), -(2.0**15)], np.float32)
    draws = [
        _draws(choose, automaton, places, weights, num_draws=20)
        for weights in (log_weights, log_weights + shifts[None, :, None])
    ]
    np.testing.assert_array_equal(*draws)


def test_a_gap_that_nothing_fills_has_no_classes(compiled, choose):
    """Known tokens contradict its pattern: at its start, at its end, or together. Other gaps are drawn all the same."""
    automaton, initial = compiled
    places = _stack(ROWS[:1] * 4, automaton, initial)
    xt = np.array([TOKENIZER.encode(text) for text in ("adaaaaa", "aaadaaa", "aacbaaa", "aaaaaaa")])
    is_known = np.array([[c == "1" for c in row] for row in ("0100000", "0001000", "0011000", "0000011")])
    uniform = jnp.zeros((4, LENGTH, automaton.num_classes))
    pinned = constraints.pin(uniform, automaton, jnp.asarray(xt), jnp.asarray(is_known))
    assert jnp.isneginf(pinned).any()
    draws = _draws(choose, automaton, places, pinned, num_draws=50)
    assert (draws[:, :3, 1:4] == -1).all()
    assert (draws[:, :3, 5:7] >= 0).all()
    assert (draws[:, 3, 1:4] >= 0).all()
    assert (draws[:, 3, 5:7] == -1).all()


def test_no_class_at_all_is_no_class(compiled):
    automaton, initial = compiled
    log_weights = jnp.full((1, LENGTH, automaton.num_classes), -jnp.inf)
    with jax.debug_nans(True):
        places = _stack(ROWS[:1], automaton, initial)
        assert (_draws(constraints.choose_classes, automaton, places, log_weights, num_draws=1) == -1).all()


def test_weights_of_what_is_not_constrained_are_not_read(compiled, choose):
    automaton, initial = compiled
    places = _stack(ROWS, automaton, initial)
    log_weights = np.random.default_rng(2).normal(size=(3, LENGTH, automaton.num_classes)).astype(np.float32)
    other = np.where(places.is_constrained[..., None], log_weights, np.float32(np.nan))
    draws = [_draws(choose, automaton, places, weights, num_draws=20) for weights in (log_weights, other)]
    np.testing.assert_array_equal(*draws)
