"""Detokenizers of test sets: the replacements that the published program makes before it tokenizes, in its order.

WikiText and the Penn Treebank have spaces around every token. These rules remove most of those spaces. Language models
trained on web text have been evaluated with them since GPT-2. Some rules do less than they seem to. They are kept,
because the published figures depend on them.
"""

import functools
import re
from collections.abc import Callable, Sequence

# What is replaced (a string or a pattern) and its replacement, or a function of the text.
Step = tuple[str | re.Pattern[str], str] | Callable[[str], str]


def _tighten(brackets: str, text: str) -> str:
    """Removes the spaces inside of brackets, each of which reaches to the next that closes it.

    As a regular expression this would take quadratic time where brackets stay open.
    """
    opening, closing = brackets
    parts, at = [], 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start + 1)) >= 0:
        parts += [text[at : start + 1], text[start + 1 : end].strip(), closing]
        at = end + 1
    return "".join([*parts, text[at:]])


_WIKITEXT: Sequence[Step] = (
    ("s '", "s'"),
    (re.compile("/' [0-9]/"), "/'[0-9]/"),
    *((f" @{sign}@ ", sign) for sign in "-,."),
    *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"),
    *(functools.partial(_tighten, brackets) for brackets in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)

_PENN_TREEBANK: Sequence[Step] = (
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    (" N ", " 1 "),
    (" N ", " 1 "),  # again, because a match consumes the space that an adjacent " N " needs
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
)

_BILLION_WORDS: Sequence[Step] = (
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *((f" {sign} ", f"{sign} ") for sign in ",:;"),
    (" / ", "/"),
    *(
        (re.compile(rf"{opening} ([^{neither}]+) {closing}"), rf"{opening[-1]}\1{closing[-1]}")
        for opening, neither, closing in (
            ('"', '"', '"'),
            ("'", "'", "'"),
            (r"\(", "()", r"\)"),
            (r"\[", r"\[\]", r"\]"),
        )
    ),
    ("$ ", "$"),
    ("£ ", "£"),
)


def wikitext(row: str) -> str:
    """Detokenize a line of WikiText."""
    return _apply(_WIKITEXT, row)


def penn_treebank(row: str) -> str:
    """Detokenize a sentence of the Penn Treebank, as Mikolov prepared it."""
    return _apply(_PENN_TREEBANK, row)


def billion_words(row: str) -> str:
    """Detokenize a sentence of One Billion Words."""
    return _apply(_BILLION_WORDS, row)


def lambada(row: str) -> str:
    """A passage of LAMBADA with plain quotation marks, after a leading newline."""
    return "\n" + row.replace("“", '"').replace("”", '"').strip()


def _apply(steps: Sequence[Step], text: str) -> str:
    for step in steps:
        if callable(step):
            text = step(text)
            continue
        old, new = step
        text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    return text
