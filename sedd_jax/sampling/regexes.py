"""Compiles regular expressions to automata over an alphabet, with the meaning that Python's `re` gives them.

`re` itself parses a pattern and says which characters each character class holds. The rest is the textbook: a
nondeterministic automaton with empty transitions (Thompson 1968), the deterministic automaton over its sets of states,
and the smallest equivalent one (Moore 1956).
"""

import collections
import dataclasses
import re
import warnings
from re import _parser  # The parser of `re` has no public name.  # pyrefly: ignore[missing-module-attribute]
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sedd_jax.runtime import errors

DEAD = 0  # The state from which no text matches.
_MAX_STATES = 5000
# What patterns may not hold, by the parser's name, and what to write instead.
_REFUSED = {
    "AT": ("an anchor or a boundary", "leave it out, since a pattern always matches the whole"),
    "ASSERT": ("a look at what surrounds it", "write out what may stand there"),
    "ASSERT_NOT": ("a look at what surrounds it", "write out what may stand there"),
    "GROUPREF": ("a reference to a group", "write the alternatives out"),
    "GROUPREF_EXISTS": ("a reference to a group", "write the alternatives out"),
    "ATOMIC_GROUP": ("an atomic group", "write (?:...) instead of (?>...)"),
    "POSSESSIVE_REPEAT": ("a possessive quantifier", "leave its second + out"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CharacterAutomaton:
    """The smallest automaton of a pattern; it reads a text character by character.

    Attributes:
        class_of: which of K classes each character of the alphabet has. A class holds characters that no part of the
            pattern tells apart.
        next_state: the state after a character of each class; `DEAD` leads only to itself.
        is_accepting: in which states a text may end.
        initial: the state in which a text starts.
    """

    class_of: dict[str, int]
    next_state: Int[np.ndarray, "S K"]
    is_accepting: Bool[np.ndarray, "S"]
    initial: int


@dataclasses.dataclass(kw_only=True, eq=False)
class _FreeMoves:
    """A nondeterministic automaton with empty transitions.

    Attributes:
        pattern: the pattern, for error messages.
        free: states that each state reaches without reading a character.
        moves: (leaf, state) pairs: states that each state reaches with a character that matches the leaf (`_leaf`).
    """

    pattern: str
    free: list[list[int]] = dataclasses.field(default_factory=list)
    moves: list[list[tuple[str, int]]] = dataclasses.field(default_factory=list)

    def state(self, *before: int) -> int:
        """Adds a state, reached from those given without reading a character; returns its number."""
        if len(self.free) == _MAX_STATES:
            raise _too_large(self.pattern)
        self.free.append([])
        self.moves.append([])
        for state in before:
            self.free[state].append(len(self.free) - 1)
        return len(self.free) - 1


def compile(pattern: str, alphabet: str) -> CharacterAutomaton:
    """The smallest automaton that accepts the same texts over an alphabet as `re.fullmatch`.

    Raises:
        errors.UserError: where the pattern is not a regular expression, depends on more than the text that it matches
            (anchors, lookaround, group references), or needs too many states.
    """
    automaton = _FreeMoves(pattern=pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # "Possible nested set": must be escaped.
            tree = _parser.parse(pattern)
        end = _append(automaton, tree, automaton.state(), tree.state.flags)
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise errors.UserError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    leaves = sorted({leaf for moves in automaton.moves for leaf, _ in moves})
    members = [set(re.findall(leaf, alphabet)) for leaf in leaves]
    signatures = [tuple(i for i, chars in enumerate(members) if char in chars) for char in alphabet]
    numbers = {signature: number for number, signature in enumerate(dict.fromkeys(signatures))}
    classes = {leaf: [k for signature, k in numbers.items() if i in signature] for i, leaf in enumerate(leaves)}
    next_state, is_accepting = _determinize(automaton, end, classes, len(numbers))
    group = _minimize(next_state, is_accepting)
    _, first = np.unique(group, return_index=True)
    return CharacterAutomaton(
        class_of={char: numbers[signature] for char, signature in zip(alphabet, signatures, strict=True)},
        next_state=group[next_state[first]],
        is_accepting=is_accepting[first],
        initial=int(group[1]),
    )


def _append(automaton: _FreeMoves, nodes: Any, state: int, flags: int) -> int:
    """Adds the nodes that `re` has parsed after a state; returns the state in which they end."""
    for op, value in nodes:
        name = str(op)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            leaf, start = _leaf(name, value, flags), state
            state = automaton.state()
            automaton.moves[start].append((leaf, state))
        elif name == "BRANCH":
            state = automaton.state(*[_append(automaton, part, state, flags) for part in value[1]])
        elif name == "SUBPATTERN":
            _, added, removed, part = value
            kept = flags & ~removed & ~(re.A | re.U if added & (re.A | re.U) else 0)
            state = _append(automaton, part, state, kept | added)
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            state = _repeat(automaton, value, state, flags)
        else:
            what, remedy = _REFUSED.get(name, (f"{name}, which is not known here", ""))
            raise errors.UserError(f"the pattern {automaton.pattern!r} holds {what}", remedy=remedy)
    return state


def _repeat(automaton: _FreeMoves, value: Any, state: int, flags: int) -> int:
    least, most, part = value
    for _ in range(least):
        # Each repetition adds a state, so that the limit on states also stops repetitions of nothing.
        state = _append(automaton, part, automaton.state(state), flags)
    if most == _parser.MAXREPEAT:
        state = automaton.state(state)
        automaton.free[_append(automaton, part, state, flags)].append(state)
        return state
    ends = [state]
    for _ in range(most - least):
        ends.append(_append(automaton, part, automaton.state(ends[-1]), flags))
    return automaton.state(*ends)


def _leaf(name: str, value: Any, flags: int) -> str:
    """A regular expression that matches the same single character as a parsed node, flags included."""
    char = "\\U{:08x}".format
    if name == "ANY":
        body = "."
    elif name == "IN":
        kinds = {"CATEGORY_DIGIT": r"\d", "CATEGORY_SPACE": r"\s", "CATEGORY_WORD": r"\w"}
        kinds |= {f"CATEGORY_NOT_{key.removeprefix('CATEGORY_')}": text.upper() for key, text in kinds.items()}
        writers = {
            "NEGATE": lambda _: "^",
            "LITERAL": char,
            "RANGE": lambda ends: f"{char(ends[0])}-{char(ends[1])}",
            "CATEGORY": lambda category: kinds[str(category)],
        }
        body = "[" + "".join(writers[str(op)](item) for op, item in value) + "]"
    else:
        body = f"[{'^' if name == 'NOT_LITERAL' else ''}{char(value)}]"
    letters = "".join(letter for letter, flag in (("a", re.A), ("i", re.I), ("s", re.S)) if flags & flag)
    return f"(?{letters}:{body})" if letters else body


def _determinize(
    automaton: _FreeMoves, end: int, classes: dict[str, list[int]], num_classes: int
) -> tuple[Int[np.ndarray, "S K"], Bool[np.ndarray, "S"]]:
    """The deterministic automaton over sets of states; the empty set is `DEAD`, the start is state 1.

    A set is a whole number with a bit for each of its states.
    """
    reached: dict[int, int] = {}

    def closure(state: int) -> int:
        if state not in reached:
            found, waiting = 1 << state, [state]
            while waiting:
                for other in automaton.free[waiting.pop()]:
                    if not found >> other & 1:
                        found |= 1 << other
                        waiting.append(other)
            reached[state] = found
        return reached[state]

    sets = {0: DEAD, closure(0): 1}
    rows = []
    waiting = collections.deque(sets)
    while waiting:
        rest, by_leaf, row = waiting.popleft(), collections.defaultdict(int), [0] * num_classes
        while rest:
            state = rest.bit_length() - 1
            rest ^= 1 << state
            for leaf, target in automaton.moves[state]:
                by_leaf[leaf] |= closure(target)
        for leaf, targets in by_leaf.items():
            for k in classes[leaf]:
                row[k] |= targets
        for targets in row:
            if targets not in sets:
                sets[targets] = len(sets)
                waiting.append(targets)
        if len(sets) > _MAX_STATES:
            raise _too_large(automaton.pattern)
        rows.append([sets[targets] for targets in row])
    return np.array(rows, np.int32).reshape(len(sets), num_classes), np.array([s >> end & 1 for s in sets], bool)


def _minimize(next_state: Int[np.ndarray, "S K"], is_accepting: Bool[np.ndarray, "S"]) -> Int[np.ndarray, " S"]:
    """Groups states that no text tells apart; returns each state's group.

    Groups are numbered in the order of their first states, so `DEAD` stays 0.
    """
    group, count = is_accepting.astype(np.int32), 0
    while True:
        seen: dict[bytes, int] = {}
        rows = np.column_stack([group, group[next_state]])
        group = np.array([seen.setdefault(row.tobytes(), len(seen)) for row in rows], np.int32)
        if len(seen) == count:
            return group
        count = len(seen)


def _too_large(pattern: str) -> errors.UserError:
    return errors.UserError(
        f"the pattern {pattern!r} needs more than {_MAX_STATES} states",
        remedy="write smaller counts, or fewer alternatives",
    )
