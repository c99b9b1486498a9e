"""Tests of detokenizers: rows become the same text as in the published program."""

import json

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
