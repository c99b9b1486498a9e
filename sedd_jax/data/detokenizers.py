"""Detokenizers of test sets: the replacements that the published program makes before it tokenizes, in its order.

WikiText and the Penn Treebank have spaces around every token. These rules remove most of those spaces. Language models
trained on web text have been evaluated with them since GPT-2. Some rules do less than they seem to. They are kept,
because the published figures depend on them.
"""

import re
from collections.abc import Sequence

# What is replaced (a string or a pattern), and its replacement.
Step = tuple[str | re.Pattern[str], str]

_WIKITEXT: Sequence[Step] = (
    ("s '", "s'"),
    (re.compile("/' [0-9]/"), "/'[0-9]/"),
    *((f" @{sign}@ ", sign) for sign in "-,."),
    *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"),
    *(
        (re.compile(rf"{opening}\s*([^{closing}]*?)\s*{closing}"), rf"{opening[-1]}\1{closing[-1]}")
        for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'"))
    ),
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
    for old, new in steps:
        text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
    return text
