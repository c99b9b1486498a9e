"""Tests of batches: each is a function of (seed, step), and over epochs every token is read equally often."""

import dataclasses
import math

import numpy as np
import pytest

from sedd_jax.data import alphabets, batches, shards
from sedd_jax.runtime import errors


def _split(num_tokens, length, shard_tokens=None):
    shard_tokens = shard_tokens or num_tokens
    parts = [np.arange(num_tokens)[start : start + shard_tokens] for start in range(0, num_tokens, shard_tokens)]
    tokens = shards.Tokens(parts=parts, dtype="<i8", shard_tokens=shard_tokens, count=num_tokens)
    return batches.PackedSplit(tokens=tokens, length=length, num_characters=3 * num_tokens, num_words=7, sha256="")


def test_sequences_are_the_text_in_order_without_the_tail():
    split = _split(23, 5)
    assert split.num_sequences == 4
    assert np.array_equal(split.sequences(), np.arange(20).reshape(4, 5))


@pytest.mark.parametrize("most", [1, 3, 4, 5, 100])
def test_spread_sequences_are_some_of_them_and_alone_are_read(most, monkeypatch):
    split = _split(233, 5, shard_tokens=17)
    monkeypatch.setattr(shards.Tokens, "read", None)
    found = split.spread(most)
    every = -(-46 // most)
    assert np.array_equal(found, np.arange(230).reshape(46, 5)[::every])
    assert 0 < len(found) <= most


def test_a_batch_depends_on_seed_and_step_alone():
    split = _split(1003, 10)
    first = split.batch(7, batch_size=8, seed=1)
    assert first.dtype == np.int32
    assert first.shape == (8, 10)
    split.batch(500, batch_size=8, seed=1)
    batches._epoch_starts.cache_clear()
    assert np.array_equal(first, _split(1003, 10).batch(7, batch_size=8, seed=1))
    assert not np.array_equal(first, split.batch(8, batch_size=8, seed=1))
    assert not np.array_equal(first, split.batch(7, batch_size=8, seed=2))


def test_ids_that_are_no_tokens_are_never_trained_on():
    """Text that was prepared with a damaged vocabulary, by an earlier version."""
    split = dataclasses.replace(_split(260, 10), tokenizer=alphabets.Bytes())
    with pytest.raises(errors.UserError, match=r"id 25[6-9] is no token of this tokenizer"):
        [split.batch(step, batch_size=8, seed=1) for step in range(4)]
    with pytest.raises(errors.UserError, match="id 256 is no token of this tokenizer"):
        split.sequences()


@pytest.mark.parametrize("shard_tokens", [7, 100, 1002])
def test_shards_change_no_batch(shard_tokens):
    whole, parts = _split(1003, 10), _split(1003, 10, shard_tokens)
    for step in (0, 12, 13, 500):
        assert np.array_equal(whole.batch(step, batch_size=8, seed=1), parts.batch(step, batch_size=8, seed=1))
    assert np.array_equal(whole.sequences(), parts.sequences())


def test_rows_are_those_of_the_whole_batch():
    split = _split(1003, 10, 100)
    whole = split.batch(7, batch_size=8, seed=1)
    assert np.array_equal(split.batch(7, batch_size=8, seed=1, rows=slice(2, 5)), whole[2:5])


def test_the_order_of_sequences_never_changes_between_versions():
    assert _split(103, 10).batch(0, batch_size=4, seed=5)[:, 0].tolist() == [100, 7, 30, 50]


def test_an_epoch_reads_every_sequence_once_and_the_next_fills_its_last_batch():
    split = _split(1003, 10)
    stream = np.concatenate([split.batch(step, batch_size=8, seed=3) for step in range(25)])
    for epoch in range(2):
        tokens = stream[epoch * 100 : (epoch + 1) * 100].ravel()
        assert len(np.unique(tokens)) == 1000
    assert not np.array_equal(stream[:100], stream[100:])
    assert not np.array_equal(np.sort(stream[:100, 0]), np.sort(stream[100:, 0]))
    assert np.array_equal((stream[:, 1:] - stream[:, :-1]) % 1003, np.ones((200, 9)))


def test_the_stream_of_sequences_is_the_same_for_every_batch_size():
    split = _split(57, 10)
    whole = split.batch(0, batch_size=24, seed=0)
    assert np.array_equal(whole, np.concatenate([split.batch(step, batch_size=3, seed=0) for step in range(8)]))


def test_every_token_is_read_equally_often_over_epochs():
    split = _split(19, 10)
    counts = np.bincount(split.batch(0, batch_size=19_000, seed=0).ravel(), minlength=19)
    assert np.abs(counts - 10_000).max() < 5 * math.sqrt(10_000)


def test_wrong_steps_are_refused():
    for step, batch_size in ((-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"step={step}, batch_size={batch_size}: step counts from 0"):
            _split(100, 10).batch(step, batch_size=batch_size, seed=0)


@pytest.mark.parametrize("num_ids", [4, 2**15])  # at 2**15 pair codes in 16 bits would collide
def test_entropies_match_their_closed_forms(num_ids):
    tokens = np.array([0, 1, 0, 2] * 4000, np.uint16) * (num_ids // 4)  # after 0 comes 1 or 2, otherwise always 0
    found = batches.entropies(tokens, num_ids)
    assert found.unigram == pytest.approx(1.5)
    assert found.bigram == pytest.approx(0.5, abs=1e-3)


def test_independent_tokens_have_no_bigram_gain():
    tokens = np.random.Generator(np.random.Philox(0)).integers(0, 8, 200_000).astype(np.uint16)
    found = batches.entropies(tokens, 8)
    assert found.unigram == pytest.approx(3, abs=1e-3)
    assert found.bigram == pytest.approx(3, abs=1e-3)
