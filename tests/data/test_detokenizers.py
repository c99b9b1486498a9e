"""Tests of detokenizers: rows become the same text as in the published program."""

import json
import random
import re

import pytest

from sedd_jax.data import detokenizers
from tests.support import places

RECORDED = places.SHARED / "golden" / "detokenizers.json"
OURS = {
    "wt": detokenizers.wikitext,
    "ptb": detokenizers.penn_treebank,
    "lm1b": detokenizers.billion_words,
    "lambada": detokenizers.lambada,
}


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded pairs lie in ../shared, which is absent")
@pytest.mark.parametrize("name", OURS)
def test_recorded_rows_become_the_same(name):
    pairs = json.loads(RECORDED.read_text())[name]
    assert len(pairs) > 20
    for row, expected in pairs:
        assert OURS[name](row) == expected


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("wt", " = = Plot = = \n", " == Plot ==\n"),
        ("wt", 'a " b " ( c ) s \' 3 @,@ 000 @-@ N x ; y', 'a "b" (c) s\' 3,000-N x; y'),
        ("wt", "at /' 5/ o'clock", "at /'[0-9]/ o'clock"),
        ("ptb", "it 's N N N <unk> dogs ' n't $ N \\/ x", "it's 1 1 1 ? dogs'n't $1 / x"),
        ("lm1b", 'he \'s at http : / / x , " no " ( yes ) $ 5 / 6 !', 'he\'s at http://x, "no" (yes) $5/6!'),
        ("lambada", " “ so ” she said \n", '\n" so " she said'),
    ],
)
def test_rules_apply_in_their_order(name, row, expected):
    assert OURS[name](row) == expected


@pytest.mark.parametrize("brackets", ["()", "[]", "{}", '""', "''"])
def test_spaces_inside_of_brackets_go_as_by_the_published_pattern(brackets):
    opening, closing = map(re.escape, brackets)
    published = re.compile(rf"{opening}\s*([^{closing}]*?)\s*{closing}")
    generator = random.Random(0)
    for _ in range(2000):
        row = "".join(generator.choices(f"{brackets}{brackets} \n\u3000\x1fab", k=generator.randrange(20)))
        expected = published.sub(lambda found: f"{brackets[0]}{found[1]}{brackets[1]}", row)
        assert detokenizers._tighten(brackets, row) == expected


def test_brackets_that_stay_open_take_linear_time():
    # The published pattern needs hours for this.
    assert detokenizers.wikitext("( [ " * 250_000) == "( [ " * 250_000
