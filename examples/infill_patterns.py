r"""Fill gaps with text that matches patterns, and check that it does.

    python examples/infill_patterns.py RUN 'In {4:1[89]\d\d} the {24} was'

In a template {n} is n tokens to fill, and {n:REGEX} is n tokens whose text matches. The pattern holds exactly: what
cannot lead to a match has probability 0 at every step.
"""

import re
import sys

import sedd_jax

YEAR = r"In {4:1[89]\d\d} the {24} was"
_GAP = re.compile(r"\{\d+(?::((?:[^{}]|\{[^{}]*\})*))?\}")


def main(run: str, template: str = YEAR, num_samples: int = 4) -> None:
    opened = sedd_jax.open(run)
    # The template as one pattern: known text as it is, a gap without a pattern as anything.
    literals, patterns = _GAP.split(template)[::2], _GAP.split(template)[1::2]
    whole = re.escape(literals[0])
    for pattern, literal in zip(patterns, literals[1:], strict=True):
        whole += f"({pattern or '.*?'}){re.escape(literal)}"
    for text in opened.infill([template] * num_samples, fit=True, seed=0):
        found = re.fullmatch(whole, text, re.DOTALL)
        assert found, text
        print(text, "|", *found.groups(), sep="  ")


if __name__ == "__main__":
    main(*sys.argv[1:3])
