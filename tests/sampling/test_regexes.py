"""Automata over characters accept what `re.fullmatch` accepts, with the fewest states; other patterns are refused."""

import itertools
import re

import numpy as np
import pytest

from sedd_jax.sampling import regexes

ALPHABET = "abA1_-.\n é"
TEXTS = ["".join(chars) for length in range(5) for chars in itertools.product(ALPHABET, repeat=length)]
PATTERNS = [
    "",
    "a",
    "ab|ba1|é",
    "a||b",
    "[ab]+",
    "[^ab]{2}",
    r"[^\w-]*",
    r"[]\-.]*a",
    r"\d\D",
    r"\s?\S+",
    r"\w{2,3}",
    r"(?a:\w+)(?:é|\W)",
    r"(?a)(?u:\w)\w",
    ".{3}",
    "(?s).a.",
    "(?s:.)a.",
    "a{2}",
    "a{,2}b",
    "a{2,}?b??",
    "(a|b{2}){1,2}",
    "((a|1)*-)*b",
    "(?i)a[^b]é?",
    "(?i:a)a",
    r"(?P<name>a)\.|\x61\u00e9\n",
    "(?x) a  b # and so on",
    "(a?){3}b*a*",
    "(()|a)+b",
    "[é-ü]|[_-a]+",
    r"\.\-\_|\ ",
    r"(?i)É+",
    "(?i)a(?-i:a)1?",
]


def accepts(automaton: regexes.CharacterAutomaton, text: str) -> bool:
    state = automaton.initial
    for char in text:
        state = automaton.next_state[state, automaton.class_of[char]]
    return bool(automaton.is_accepting[state])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_accepted_is_what_matches_as_a_whole(pattern):
    automaton = regexes.compile(pattern, ALPHABET)
    expected = re.compile(pattern)
    accepted = [text for text in TEXTS if accepts(automaton, text)]
    assert accepted == [text for text in TEXTS if expected.fullmatch(text)]
    assert accepted


@pytest.mark.parametrize("pattern", [*PATTERNS, "[^ab]*x", r"[^\s\S]"])
def test_states_are_live_and_different(pattern):
    """From every state but the dead one some text matches, and no two states accept the same texts."""
    automaton = regexes.compile(pattern, ALPHABET)
    num_states = len(automaton.next_state)
    assert (automaton.next_state[regexes.DEAD] == regexes.DEAD).all()
    # After round k: pairs of states that some text of at most k characters tells apart.
    different = automaton.is_accepting[:, None] != automaton.is_accepting[None]
    for _ in range(num_states):
        of_next = different[automaton.next_state[:, None], automaton.next_state[None]]
        different |= of_next.any(-1)
    assert (different | np.eye(num_states, dtype=bool)).all()


@pytest.mark.parametrize("pattern", ["x", r"[^\s\S]", "a[^a-]*x"])
def test_what_matches_nothing_starts_dead(pattern):
    automaton = regexes.compile(pattern, ALPHABET)
    assert automaton.initial == regexes.DEAD
    assert len(automaton.next_state) == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^a", "'\\^a' holds an anchor or a boundary: leave it out"),
        ("a$", "an anchor"),
        (r"\ba", "an anchor or a boundary"),
        ("(?=a)b", r"holds a look at what surrounds it: write out"),
        ("(?<!a)b", "holds a look at what surrounds it"),
        (r"(a)\1", "a reference to a group"),
        ("(a)?(?(1)b|a)", "a reference to a group"),
        ("(?>a|ab)b", r"an atomic group: write \(\?:\.\.\.\)"),
        ("a*+a", r"a possessive quantifier: leave its second \+ out"),
        ("a(b", r"'a\(b' is no regular expression: missing \), unterminated subpattern at position 1"),
        ("a**", "is no regular expression: multiple repeat"),
        (r"\p{L}", r"is no regular expression: bad escape \\p"),
        ("[b-a]", "bad character range b-a"),
        ("[[a]", "is no regular expression: Possible nested set"),
        ("a{99999999999}", "is no regular expression: the repetition number is too large"),
        ("(" * 5000 + ")" * 5000, "is no regular expression: maximum recursion depth"),
    ],
)
def test_what_is_no_regular_expression_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        regexes.compile(pattern, ALPHABET)


@pytest.mark.parametrize("pattern", ["(a|b)*a(a|b){13}", "(a{999}){999}", "(){1000000000}", "(?:){0,1000000000}"])
def test_too_many_states_are_refused_at_once(pattern):
    with pytest.raises(ValueError, match="needs more than 5000 states: write smaller counts"):
        regexes.compile(pattern, ALPHABET)
