"""Regular expressions to automata over the characters of an alphabet, with the meaning that Python's `re` gives them.

`re` itself parses them and says which characters each class holds; what is left is the textbook: an automaton with
free moves (Thompson 1968), one over its sets of states, and the least one of these (Moore 1956).
"""

import collections
import dataclasses
import re
import warnings
from re import _parser  # The parser of `re` has no public name.  # pyrefly: ignore[missing-module-attribute]
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

DEAD = 0  # The state from which no text matches.
_MAX_STATES = 5000
_REFUSED = {
    "AT": "an anchor or a boundary: leave it out, since a pattern always matches the whole",
    "ASSERT": "a look at what surrounds it: write out what may stand there",
    "ASSERT_NOT": "a look at what surrounds it: write out what may stand there",
    "GROUPREF": "a reference to a group: write the alternatives out",
    "GROUPREF_EXISTS": "a reference to a group: write the alternatives out",
    "ATOMIC_GROUP": "an atomic group: write (?:...) instead of (?>...)",
    "POSSESSIVE_REPEAT": "a possessive quantifier: leave its second + out",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CharacterAutomaton:
    """Reads a text character by character; the least automaton of its pattern.

    Attributes:
        class_of: which of K classes each character of the alphabet has: those that no part of the pattern tells apart.
        next_state: the state after a character of each class; `DEAD` stays so.
        is_accepting: where a text may end.
        initial: where it starts.
    """

    class_of: dict[str, int]
    next_state: Int[np.ndarray, "S K"]
    is_accepting: Bool[np.ndarray, "S"]
    initial: int


@dataclasses.dataclass(kw_only=True, eq=False)
class _FreeMoves:
    """An automaton with free moves: for every state, where it may go freely, and where with a character of a leaf."""

    pattern: str
    free: list[list[int]] = dataclasses.field(default_factory=list)
    moves: list[list[tuple[str, int]]] = dataclasses.field(default_factory=list)

    def state(self, *before: int) -> int:
        """A new state, reached freely from those before."""
        if len(self.free) == _MAX_STATES:
            raise _too_large(self.pattern)
        self.free.append([])
        self.moves.append([])
        for state in before:
            self.free[state].append(len(self.free) - 1)
        return len(self.free) - 1


def compile(pattern: str, alphabet: str) -> CharacterAutomaton:
    """The least automaton that accepts the texts over an alphabet that `re.fullmatch` accepts.

    Raises:
        ValueError: where the pattern is none, depends on more than the text it matches, or needs too many states.
    """
    automaton = _FreeMoves(pattern=pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # "Possible nested set": to be escaped
            tree = _parser.parse(pattern)
        end = _append(automaton, tree, automaton.state(), tree.state.flags)
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error
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
    """Appends what `re` has parsed to a state; where that ends."""
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
            raise ValueError(
                f"the pattern {automaton.pattern!r} holds {_REFUSED.get(name, f'{name}, which is not known here')}"
            )
    return state


def _repeat(automaton: _FreeMoves, value: Any, state: int, flags: int) -> int:
    least, most, part = value
    for _ in range(least):
        # A state of its own, so that even of nothing there are not too many.
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
    """A regular expression for one character, flags included."""
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
    """The automaton over sets of states, each a number whose bits they are; the empty one is `DEAD`, the start is 1."""
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
    """Which of the states that no text tells apart each state is; numbered by their first, so `DEAD` stays."""
    group, count = is_accepting.astype(np.int32), 0
    while True:
        seen: dict[bytes, int] = {}
        rows = np.column_stack([group, group[next_state]])
        group = np.array([seen.setdefault(row.tobytes(), len(seen)) for row in rows], np.int32)
        if len(seen) == count:
            return group
        count = len(seen)


def _too_large(pattern: str) -> ValueError:
    return ValueError(
        f"the pattern {pattern!r} needs more than {_MAX_STATES} states: write smaller counts, or fewer alternatives"
    )
