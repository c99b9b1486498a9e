"""What is packed is the text; a batch is a function of (seed, step); nothing is dropped or read damaged."""

import base64
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from sedd_jax import batches, tokenizers

TEXTS = {"train": "abcab\fcab\nb\f" + "cab" * 30, "valid": "bca\fab\n", "test": "cc"}


@pytest.fixture
def source(tmp_path):
    for split, text in TEXTS.items():
        (tmp_path / f"{split}.txt").write_text(text)
    return f"text:{tmp_path}/{{split}}.txt"


@pytest.fixture
def characters():
    return tokenizers.Characters(alphabet="\nabc")


@pytest.fixture
def packed(source, characters, tmp_path):
    batches.pack(source, characters, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def byte_pairs(tmp_path):
    path = tmp_path / "bytes.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)))
    return tokenizers.build(f"gpt2:{path}", lambda: ())


def _split(num_tokens, length):
    return batches.PackedSplit(tokens=np.arange(num_tokens), length=length, num_characters=3 * num_tokens)


def test_characters_are_packed_with_blank_lines_between_documents(packed, characters):
    for split, text in TEXTS.items():
        opened = batches.open_split(packed, split, 2, tokenizer=characters)
        expected = text.strip("\n").replace("\f", "\n\n")
        assert characters.decode(opened.tokens) == expected
        assert opened.num_characters == opened.num_tokens == len(expected)
    batches.verify(packed)


def test_an_alphabet_without_newline_joins_documents_by_a_space(tmp_path, source):
    (tmp_path / "train.txt").write_text("ab\fc")
    (tmp_path / "valid.txt").write_text("a\fb\fc")
    text8 = tokenizers.build("text8", lambda: ())
    batches.pack(source, text8, tmp_path / "packed")
    assert text8.decode(batches.open_split(tmp_path / "packed", "train", 2).tokens) == "ab c"
    assert text8.decode(batches.open_split(tmp_path / "packed", "valid", 2).tokens) == "a b c"


def test_an_end_of_text_follows_each_document_and_is_no_character(tmp_path, source, byte_pairs):
    batches.pack(source, byte_pairs, tmp_path / "packed")
    valid = batches.open_split(tmp_path / "packed", "valid", 2)
    assert valid.tokens.tolist() == [*b"bca", 256, *b"ab", 256]
    assert (valid.num_tokens, valid.num_characters) == (7, 5)
    assert valid.characters_per_token == 5 / 7


def test_ids_are_packed_with_nothing_between_documents(tmp_path, source):
    for split in TEXTS:
        (tmp_path / f"{split}.txt").write_text("1 2\f3")
    batches.pack(source, tokenizers.Ids(vocab_size=4), tmp_path / "packed")
    assert batches.open_split(tmp_path / "packed", "train", 2).tokens.tolist() == [1, 2, 3]


def test_ids_beyond_two_bytes_take_four(tmp_path):
    tokenizer = tokenizers.Characters(alphabet="".join(map(chr, range(0x10000, 0x20001))))
    (tmp_path / "text.txt").write_text("\n".join(["ok"] * 40).translate({ord("o"): 0x10000, ord("k"): 0x20000, 10: 10}))
    tokenizer = dataclasses.replace(tokenizer, alphabet="\n" + tokenizer.alphabet)
    batches.pack(f"text:{tmp_path}/text.txt", tokenizer, tmp_path / "packed")
    assert batches.open_split(tmp_path / "packed", "test", 2).tokens[:2].tolist() == [1, 65537]
    assert (tmp_path / "packed" / "test.bin").read_bytes()[4:8] == (65537).to_bytes(4, "little")


def test_sixteen_bits_hold_65536_ids(tmp_path, source):
    batches.pack(source, tokenizers.Characters(alphabet="".join(map(chr, range(65536)))), tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "header.json").read_text())["dtype"] == "<u2"


def test_sequences_are_the_text_in_order_without_the_tail():
    split = _split(23, 5)
    assert split.num_sequences == 4
    assert np.array_equal(split.sequences(), np.arange(20).reshape(4, 5))


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


def test_finished_text_is_never_overwritten_and_unfinished_is(packed, source, characters):
    assert batches.is_packed(packed)
    with pytest.raises(FileExistsError, match="already holds packed text"):
        batches.pack(source, characters, packed)
    (packed / "header.json").unlink()
    (packed / "train.bin").write_bytes(b"half written, and longer than what follows" * 100)
    assert not batches.is_packed(packed)
    with pytest.raises(FileNotFoundError, match=r"holds no finished header.json: pack"):
        batches.open_split(packed, "train", 2)
    batches.pack(source, characters, packed)
    batches.verify(packed)
    assert sorted(path.name for path in packed.iterdir()) == ["header.json", "test.bin", "train.bin", "valid.bin"]


def test_a_failure_while_packing_leaves_no_header(tmp_path, source):
    with pytest.raises(ValueError, match=r"'\\n' \(U\+000A\) at position"):
        batches.pack(source, tokenizers.Characters(alphabet="abc"), tmp_path / "packed")
    assert not batches.is_packed(tmp_path / "packed")


def test_damaged_files_are_named(packed):
    content = (packed / "valid.bin").read_bytes()
    (packed / "valid.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    batches.open_split(packed, "valid", 2)
    with pytest.raises(ValueError, match=r"valid.bin is damaged \(sha256"):
        batches.verify(packed)
    (packed / "valid.bin").write_bytes(content[:-2])
    for read in (batches.verify, lambda folder: batches.open_split(folder, "valid", 2)):
        with pytest.raises(
            ValueError, match=rf"valid.bin is damaged \({len(content) - 2} bytes, packed as {len(content)}"
        ):
            read(packed)
    (packed / "valid.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid.bin is missing"):
        batches.open_split(packed, "valid", 2)
    batches.open_split(packed, "train", 2)


def test_opening_says_what_does_not_fit(packed):
    with pytest.raises(ValueError, match=r"test split in .* has 2 tokens, which length=3 does not fit: choose"):
        batches.open_split(packed, "test", 3)
    with pytest.raises(ValueError, match="length=0 does not fit"):
        batches.open_split(packed, "test", 0)
    with pytest.raises(ValueError, match="split='dev' does not exist"):
        batches.open_split(packed, "dev", 3)
    with pytest.raises(ValueError, match="packed with another tokenizer"):
        batches.open_split(packed, "test", 2, tokenizer=tokenizers.Characters(alphabet="\nabcd"))
    header = json.loads((packed / "header.json").read_text())
    (packed / "header.json").write_text(json.dumps(header | {"format_version": 2}))
    with pytest.raises(ValueError, match="has format 2, this reads 1"):
        batches.open_split(packed, "test", 2)


def test_a_directory_that_cannot_be_written_is_named(tmp_path, source, characters):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"file/packed cannot be written .*choose a directory"):
        batches.pack(source, characters, tmp_path / "file" / "packed")


def test_packing_twice_gives_the_same_bytes(tmp_path, source, characters):
    contents = []
    for _ in range(2):
        batches.pack(source, characters, tmp_path / "packed")
        contents.append([path.read_bytes() for path in sorted((tmp_path / "packed").iterdir())])
        shutil.rmtree(tmp_path / "packed")
    assert contents[0] == contents[1]


@pytest.mark.parametrize("num_ids", [4, 2**15])  # at 2**15 pair codes in 16 bits would collide
def test_entropies_match_their_closed_forms(num_ids):
    tokens = np.array([0, 1, 0, 2] * 4000, np.uint16) * (num_ids // 4)  # after 0 one of two, else always 0
    found = batches.entropies(tokens, num_ids)
    assert found.unigram == pytest.approx(1.5)
    assert found.bigram == pytest.approx(0.5, abs=1e-3)


def test_independent_tokens_have_no_bigram_gain():
    tokens = np.random.Generator(np.random.Philox(0)).integers(0, 8, 200_000).astype(np.uint16)
    found = batches.entropies(tokens, 8)
    assert found.unigram == pytest.approx(3, abs=1e-3)
    assert found.bigram == pytest.approx(3, abs=1e-3)
