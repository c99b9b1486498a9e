"""Regular expressions that the text of a gap must match: from the characters of a pattern to a tokenizer's tokens.

A gap of n tokens matches if the concatenation of their texts does. The text of a token is what decoding writes for it
at its position. If decoding puts a space between a token and the one before, its text in the middle of a sequence is
` cat`, not `cat`.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sedd_jax.data import alphabets, tokenizers
from sedd_jax.diffusion import graphs
from sedd_jax.runtime import errors
from sedd_jax.sampling import constraints, regexes

_MAX_TABLE = 2**22  # Most states times classes: a sampler holds a float of each for every sequence of a batch.
_NO_TEXT = "\ufffd"  # What decoding writes for bytes that are not UTF-8.


class Gap(NamedTuple):
    """The tokens [start, start + length) of a sequence; their text must match the pattern."""

    start: int
    length: int
    pattern: str


class Starts(NamedTuple):
    """States in which a pattern starts: `within` in the middle of a text, `first` at the start of it."""

    within: int
    first: int


@functools.cache
def token_texts(tokenizer: tokenizers.Tokenizer) -> tuple[str, ...]:
    """The text of each id in the middle of a sequence; "" for an id that is not text by itself.

    Such ids are special tokens (end of text, mask and others) and parts of characters.

    Raises:
        errors.UserError: where the run's ids stand for no text at all.
    """
    if isinstance(tokenizer, alphabets.Ids):
        raise errors.UserError(
            "a pattern is about text, and this run has ids only", remedy="give it its tokenizer, or leave it out"
        )
    decode = lambda *ids: tokenizer.decode(np.array(ids, np.int32))
    texts = [""] * tokenizers.num_ids(tokenizer)
    ids = sorted(set(range(len(texts))) - tokenizer.special_ids)
    # Decoding may drop a space at the start of a text, so each id is decoded after a token with visible text.
    before = next((id_ for id_ in ids if decode(id_).strip() and _NO_TEXT not in decode(id_)), None)
    if before is not None:
        start = len(decode(before))
        for id_ in ids:
            text = decode(before, id_)[start:]
            texts[id_] = "" if _NO_TEXT in text else text
    return tuple(texts)


@functools.cache
def first_texts(tokenizer: tokenizers.Tokenizer) -> tuple[str, ...]:
    """The text of each id as the first of a sequence, see `token_texts`; "" also for a space that is dropped there."""
    texts = token_texts(tokenizer)
    return tuple(text and tokenizer.decode(np.array([id_], np.int32)) for id_, text in enumerate(texts))


def compile(
    patterns: Sequence[str], tokenizer: tokenizers.Tokenizer, graph: graphs.Graph
) -> tuple[constraints.Automaton, dict[str, Starts]]:
    """One automaton over tokens for all patterns, and the states in which each pattern starts.

    Raises:
        errors.UserError: names a pattern that is not a regular expression, or patterns that need too many states.
    """
    return _compile(tuple(dict.fromkeys(patterns)), tokenizer, graph)


@functools.lru_cache(maxsize=16)  # Checking a pattern and drawing with it compile the same automaton.
def _compile(
    patterns: tuple[str, ...], tokenizer: tokenizers.Tokenizer, graph: graphs.Graph
) -> tuple[constraints.Automaton, dict[str, Starts]]:
    texts, at_start = token_texts(tokenizer), first_texts(tokenizer)
    has_own = at_start != texts
    alphabet = "".join(sorted(set().union(*texts, *at_start)))
    characters = [regexes.compile(pattern, alphabet) for pattern in patterns]
    # For each pattern and token: the token's class, and the state to which it leads as the first of a text.
    classes, firsts = np.zeros((2, len(patterns), graph.num_states), np.int32)
    tables = []
    for row, first, automaton in zip(classes, firsts, characters, strict=True):
        row[: len(texts)], table = _tokens(automaton, texts)
        tables.append(table)
        if has_own:
            kinds, own = _tokens(automaton, at_start)
            first[: len(texts)] = own[automaton.initial, kinds]
    distinct, class_of = np.unique(np.concatenate([classes, firsts]), axis=1, return_inverse=True)
    classes, firsts = np.split(distinct, 2)
    num_states = 1 + sum(len(table) - 1 + has_own for table in tables)
    if num_states * distinct.shape[1] > _MAX_TABLE:
        raise errors.UserError(
            f"the patterns {', '.join(map(repr, patterns))} need {num_states} states by {distinct.shape[1]} kinds of "
            f"tokens, more than {_MAX_TABLE}",
            remedy="write fewer alternatives, or give fewer patterns at once",
        )
    blocks, accepting, initial = [np.zeros((1, distinct.shape[1]), np.int32)], [np.zeros(1, bool)], {}
    offset = 0
    for pattern, automaton, table, kinds, first in zip(patterns, characters, tables, classes, firsts, strict=True):
        # All patterns share the dead state.
        shift = lambda states, offset=offset: np.where(states == regexes.DEAD, states, states + offset)
        blocks.append(shift(table[1:, kinds]))
        accepting.append(automaton.is_accepting[1:])
        start = within = int(shift(automaton.initial))
        offset += len(table) - 1
        if has_own:
            blocks.append(shift(first)[None])
            accepting.append(automaton.is_accepting[[automaton.initial]])
            start = offset = offset + 1
        initial[pattern] = Starts(within, start)
    automaton = constraints.Automaton(
        class_of=class_of.reshape(-1).astype(np.int32),
        next_state=np.concatenate(blocks).astype(np.int32),
        is_accepting=np.concatenate(accepting),
    )
    return automaton, initial


def place(
    gaps: Sequence[Gap], length: int, automaton: constraints.Automaton, initial: dict[str, Starts]
) -> constraints.Places:
    """Positions of the gaps of one sequence with L = `length` tokens, as arrays [L]."""
    start = np.full(length, -1, np.int32)
    is_last, is_constrained = np.zeros(length, bool), np.zeros(length, bool)
    for gap in (gap for gap in gaps if gap.length):
        start[gap.start] = _starts_in(gap, initial)
        is_last[gap.start + gap.length - 1] = True
        is_constrained[gap.start : gap.start + gap.length] = True
    return constraints.Places(start=start, is_last=is_last, is_constrained=is_constrained)


def kinds(gaps: Iterable[Gap]) -> dict[tuple[Any, ...], Gap]:
    """One gap of each kind. Gaps of one kind can either all be filled, or none of them."""
    return {(gap.start == 0, gap.length, gap.pattern): gap for gap in gaps}


def check(gap: Gap, automaton: constraints.Automaton, initial: dict[str, Starts]) -> None:
    """Checks that some text of `gap.length` tokens matches the gap's pattern.

    Raises:
        errors.UserError: names the nearest lengths at which a text matches, where none of this length does.
    """
    reached = np.array([_starts_in(gap, initial)])
    if not gap.length and automaton.is_accepting[reached].all():
        return
    seen = np.zeros(len(automaton.next_state), bool)
    shorter, longer = [], []
    number = 0
    # If longer texts match, the shortest of them passes no state twice after the gap's length.
    while len(reached) and not longer and number <= gap.length + seen.sum():
        seen[reached] = True
        number += 1
        reached = np.unique(automaton.next_state[reached])
        reached = reached[reached != regexes.DEAD]
        if automaton.is_accepting[reached].any():
            if number == gap.length:
                return
            if number < gap.length:
                shorter = [number]
            else:
                longer = [number]
    known = " or ".join(map(str, shorter + longer))
    raise errors.UserError(
        f"the gap {{{gap.length}:{gap.pattern}}} cannot be filled: no text of {gap.length} tokens matches, "
        + (f"texts of {known} do" if known else "and none of any other number")
    )


def _starts_in(gap: Gap, initial: dict[str, Starts]) -> int:
    return initial[gap.pattern].within if gap.start else initial[gap.pattern].first


def _tokens(
    automaton: regexes.CharacterAutomaton, texts: tuple[str, ...]
) -> tuple[Int[np.ndarray, " V"], Int[np.ndarray, "S C"]]:
    """The class of every token, and the state after each class from every state. Class 0 is never allowed."""
    states = np.arange(len(automaton.next_state), dtype=np.int32)
    dead = np.full_like(states, regexes.DEAD)
    columns, numbers = [dead], {dead.tobytes(): 0}
    after, found = {"": states}, {"": 0}
    # With its characters replaced by their classes, a text is one of few.
    as_classes = str.maketrans({char: chr(k) for char, k in automaton.class_of.items()})
    classes = np.zeros(len(texts), np.int32)
    for id_, text in enumerate(texts):
        kind = text.translate(as_classes)
        if kind not in found:
            column = dead
            for end in range(1, len(kind) + 1):
                if kind[:end] not in after:
                    after[kind[:end]] = automaton.next_state[after[kind[: end - 1]], ord(kind[end - 1])]
                column = after[kind[:end]]
                if not column.any():
                    break
            found[kind] = numbers.setdefault(column.tobytes(), len(columns))
            if found[kind] == len(columns):
                columns.append(column)
        classes[id_] = found[kind]
    return classes, np.stack(columns, axis=1)
