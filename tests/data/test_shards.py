"""Tests of prepared text: it does not depend on shards or processes, and damage or changes are reported."""

import base64
import grp
import hashlib
import json
import pathlib
import pwd
import shutil

import numpy as np
import pytest

from sedd_jax.data import alphabets, batches, corpora, encoders, shards, tokenizers
from sedd_jax.runtime import errors, storage
from tests.support import gcs_emulator

TEXTS = {"train": "abcab\fcab\nb\f" + "cab" * 30, "valid": "bca\fab\n", "test": "cc"}


@pytest.fixture
def source(tmp_path):
    for split, text in TEXTS.items():
        (tmp_path / f"{split}.txt").write_text(text)
    return f"text:{tmp_path}/{{split}}.txt"


@pytest.fixture
def characters():
    return alphabets.Characters(alphabet="\nabc")


@pytest.fixture
def packed(source, characters, tmp_path):
    return _pack(source, characters, tmp_path / "packed")


@pytest.fixture
def byte_pairs(tmp_path):
    path = tmp_path / "bytes.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)))
    return tokenizers.build(f"gpt2:{path}", lambda: ())


def _pack(source, tokenizer, directory, num_workers=1):
    directory.mkdir()
    shards.pack(
        corpora.find(source), tokenizer, directory, source=source, tokenizer_spec="as given", num_workers=num_workers
    )
    return directory


def _tokens(directory, split):
    counts, tokens = shards.open_split(directory, split)
    return counts, tokens.read(0, len(tokens))


def test_characters_are_packed_with_blank_lines_between_documents(packed, characters):
    for split, text in TEXTS.items():
        counts, tokens = _tokens(packed, split)
        expected = text.strip("\n").replace("\f", "\n\n")
        assert characters.decode(tokens) == expected
        assert counts["num_characters"] == counts["num_tokens"] == len(expected)
        assert counts["num_documents"] == text.count("\f") + 1
        assert counts["num_words"] == len(expected.split())
        assert counts["num_unknown"] == counts["num_empty"] == 0
    shards.verify(packed)


def test_an_alphabet_without_newline_joins_documents_by_a_space(tmp_path, source):
    (tmp_path / "train.txt").write_text("ab\fc")
    (tmp_path / "valid.txt").write_text("a\fb\fc")
    text8 = tokenizers.build("text8", lambda: ())
    _pack(source, text8, tmp_path / "packed")
    assert text8.decode(_tokens(tmp_path / "packed", "train")[1]) == "ab c"
    assert text8.decode(_tokens(tmp_path / "packed", "valid")[1]) == "a b c"


def test_an_end_of_text_follows_each_document_and_is_no_character(tmp_path, source, byte_pairs):
    counts, tokens = _tokens(_pack(source, byte_pairs, tmp_path / "packed"), "valid")
    assert tokens.tolist() == [*b"bca", 256, *b"ab", 256]
    assert (counts["num_tokens"], counts["num_characters"], counts["num_words"]) == (7, 5, 2)


def test_ids_are_packed_with_nothing_between_documents(tmp_path, source):
    for split in TEXTS:
        (tmp_path / f"{split}.txt").write_text("1 2\f3")
    _pack(source, alphabets.Ids(vocab_size=4), tmp_path / "packed")
    assert _tokens(tmp_path / "packed", "train")[1].tolist() == [1, 2, 3]


def test_ids_beyond_two_bytes_take_four(tmp_path):
    tokenizer = alphabets.Characters(alphabet="\n" + "".join(map(chr, range(0x10000, 0x20001))))
    (tmp_path / "text.txt").write_text("\n".join(["\U00010000\U00020000"] * 40))
    _pack(f"text:{tmp_path}/text.txt", tokenizer, tmp_path / "packed")
    assert _tokens(tmp_path / "packed", "test")[1][:2].tolist() == [1, 65537]
    assert (tmp_path / "packed" / "test-00000.bin").read_bytes()[4:8] == (65537).to_bytes(4, "little")


def test_sixteen_bits_hold_65536_ids(tmp_path, source):
    _pack(
        source,
        alphabets.Characters(alphabet="".join(map(chr, (*range(0xD800), *range(0xE000, 0x10800))))),
        tmp_path / "packed",
    )
    assert json.loads((tmp_path / "packed" / "header.json").read_text())["dtype"] == "<u2"


def test_empty_documents_are_left_out_and_counted_or_kept(tmp_path, byte_pairs):
    (tmp_path / "test.txt").write_text("one\n\n  \ntwo\n")
    counts, tokens = _tokens(_pack(f"lines:{tmp_path}/{{split}}.txt", byte_pairs, tmp_path / "left_out"), "test")
    assert tokens.tolist() == [*b"one", 256, *b"two", 256]
    assert (counts["num_documents"], counts["num_empty"], counts["first_empty"]) == (2, 2, f"{tmp_path}/test.txt:2")
    counts, tokens = _tokens(_pack(f"ptb:lines:{tmp_path}/{{split}}.txt", byte_pairs, tmp_path / "kept"), "test")
    assert tokens.tolist() == [*b"one", 256, 256, 256, *b"two", 256]
    assert (counts["num_documents"], counts["num_empty"]) == (4, 0)


def test_unknown_tokens_are_counted(tmp_path, source):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[UNK]\n[SEP]\n[MASK]\ncc\n")
    counts, _ = _tokens(_pack(source, tokenizers.build(f"wordpiece:{vocabulary}", lambda: ()), tmp_path / "p"), "train")
    assert (counts["num_unknown"], counts["num_tokens"]) == (4, 7)


def test_owners_without_a_name_are_no_matter(tmp_path, source, characters, monkeypatch):
    """In containers and on network file systems files belong to numbers."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    packed = _pack(source, characters, tmp_path / "packed")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert len(shards.open_split(packed, "test")[1]) > 0
    shards.verify(packed)


def test_ids_that_are_no_tokens_are_not_packed(tmp_path, source, byte_pairs, monkeypatch):
    """A tokenizer that gives an id without a state is named with the document, and nothing is written."""
    monkeypatch.setattr(tokenizers, "num_ids", lambda _: 98)
    with pytest.raises(errors.UserError, match=r"train.txt:1: id \d+ is no token of this tokenizer"):
        _pack(source, byte_pairs, tmp_path / "p")
    assert not shards.is_packed(tmp_path / "p")


def test_shards_and_processes_change_no_token(tmp_path, monkeypatch, byte_pairs):
    text = "\f".join("word " * (number % 50) + str(number) for number in range(12_000))
    (tmp_path / "train.txt").write_text(text)
    for split in ("valid", "test"):
        (tmp_path / f"{split}.txt").write_text("held out")
    source = f"text:{tmp_path}/{{split}}.txt"
    counts, expected = _tokens(_pack(source, byte_pairs, tmp_path / "one"), "train")
    assert len(counts["shards"]) == 1
    monkeypatch.setattr(shards, "SHARD_TOKENS", 200_003)
    many, tokens = _tokens(_pack(source, byte_pairs, tmp_path / "many", num_workers=2), "train")
    assert len(many["shards"]) == -(-len(expected) // 200_003) > 3
    assert np.array_equal(tokens, expected)
    assert {**many, "shards": None} == {**counts, "shards": None}
    contents = [(tmp_path / "many" / shard["file"]).read_bytes() for shard in many["shards"]]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    assert digests == [shard["sha256"] for shard in many["shards"]]
    assert {len(content) for content in contents[:-1]} == {2 * 200_003}
    opened = batches.open_split(tmp_path / "many", "train", 64)
    whole = batches.open_split(tmp_path / "one", "train", 64)
    assert np.array_equal(opened.batch(3, batch_size=99, seed=0), whole.batch(3, batch_size=99, seed=0))


def test_documents_are_joined_over_tasks_as_in_one(packed, source, characters, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "_CHARACTERS_AT_ONCE", 1)
    _pack(source, characters, tmp_path / "again")
    for path in packed.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_document_that_cannot_be_tokenized_is_named_by_its_place(tmp_path, source):
    for num_workers in (1, 2):
        with pytest.raises(ValueError, match=r"train.txt:1: '\\n' \(U\+000A\) at position 3 is not in the alphabet"):
            _pack(source, alphabets.Characters(alphabet="abc"), tmp_path / str(num_workers), num_workers)
        assert not shards.is_packed(tmp_path / str(num_workers))


def test_a_split_without_text_is_an_error(tmp_path, source, characters):
    (tmp_path / "valid.txt").write_text(" \n")
    with pytest.raises(ValueError, match="the valid split holds no text: give it more"):
        _pack(source, characters, tmp_path / "packed")


def test_damaged_shards_are_named(packed, tmp_path):
    shard = packed / "valid-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shards.open_split(packed, "valid")
    with pytest.raises(ValueError, match=r"valid-00000.bin is damaged \(sha256"):
        shards.verify(packed)
    shard.write_bytes(content[:-2])
    for read in (shards.verify, lambda folder: shards.open_split(folder, "valid")):
        with pytest.raises(
            ValueError, match=rf"valid-00000.bin is damaged \({len(content) - 2} bytes, written as {len(content)}"
        ):
            read(packed)
    shard.unlink()
    with pytest.raises(errors.UserError, match=r"valid-00000.bin is missing"):
        shards.open_split(packed, "valid")
    shards.open_split(packed, "train")


def test_a_damaged_or_foreign_header_is_named(packed):
    content = (packed / "header.json").read_text()
    for damaged in (content[:50], "[]", "{}"):
        (packed / "header.json").write_text(damaged)
        with pytest.raises(errors.UserError, match=r"header.json is damaged .*prepare it again"):
            shards.read_header(packed)
    (packed / "header.json").write_text(json.dumps(json.loads(content) | {"format_version": 3}))
    with pytest.raises(ValueError, match="has format 3, and this version reads 2"):
        shards.read_header(packed)
    (packed / "header.json").unlink()
    with pytest.raises(
        errors.UserError, match=r"finished header.json: remove it, and run `sedd prepare --data=.*packed`"
    ):
        shards.read_header(packed)
    with pytest.raises(errors.UserError, match=r"none holds no finished header.json: run `sedd prepare"):
        shards.read_header(packed / "none")


def test_what_is_no_prepared_text_is_not_to_be_removed(tmp_path):
    (tmp_path / "novel.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "novel.txt"):
        with pytest.raises(errors.UserError, match=r"header.json: name a directory that `sedd prepare` has made$"):
            shards.read_header(place)


def test_opening_says_what_does_not_fit(packed):
    with pytest.raises(ValueError, match=r"test split in .* has 2 tokens, which length=3 does not fit: choose"):
        batches.open_split(packed, "test", 3)
    with pytest.raises(ValueError, match="length=0 does not fit"):
        batches.open_split(packed, "test", 0)
    with pytest.raises(ValueError, match=r"the split 'dev' is not in .*: choose one of train, valid, test"):
        batches.open_split(packed, "dev", 3)
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        batches.open_split(packed, "test", 2, tokenizer=alphabets.Characters(alphabet="\nabcd"))


def test_a_link_reads_what_it_stands_for_until_that_changes(packed, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards.link(tmp_path / "run" / "data", pathlib.Path("packed"))
    monkeypatch.chdir("/")
    assert np.array_equal(_tokens(tmp_path / "run" / "data", "train")[1], _tokens(packed, "train")[1])
    shards.verify(tmp_path / "run" / "data")
    shards.link(tmp_path / "other" / "data", tmp_path / "run" / "data")
    assert np.array_equal(_tokens(tmp_path / "other" / "data", "train")[1], _tokens(packed, "train")[1])
    shard = packed / "valid-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(ValueError, match=r"packed/valid-00000.bin is damaged \(sha256"):
        shards.verify(tmp_path / "run" / "data")
    shutil.rmtree(packed)
    with pytest.raises(errors.UserError, match=r"packed, the text of this run, holds no finished header.json: put"):
        shards.verify(tmp_path / "run" / "data")
    _pack(source, alphabets.Characters(alphabet="\nabcd"), packed)
    for read in (shards.verify, lambda folder: shards.open_split(folder, "train")):
        with pytest.raises(ValueError, match=r"packed has changed since this run began with it: put the text back"):
            read(tmp_path / "run" / "data")


def test_packing_twice_gives_the_same_bytes(tmp_path, source, characters):
    contents = []
    for name in ("one", "two"):
        _pack(source, characters, tmp_path / name)
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert contents[0] == contents[1]


def test_shards_in_a_bucket_are_read_by_range(tmp_path, source, characters, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", 7)
    packed = _pack(source, characters, tmp_path / "packed")
    asked = []
    with gcs_emulator.Server("bucket", before=lambda method, path: asked.append(path)) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        place = storage.directory("gs://bucket/data/abc")
        local = storage.local_copy(place)
        shutil.copytree(packed, local)
        storage.upload(place)
        shutil.rmtree(local)
        shards.verify(place)
        here, there = (batches.open_split(directory, "train", 5, tokenizer=characters) for directory in (packed, place))
        asked.clear()
        assert np.array_equal(there.batch(2, batch_size=4, seed=0), here.batch(2, batch_size=4, seed=0))
        # Downloads only: gcsfs drops a listing that it no longer needs, and such a request may still arrive here.
        assert 4 <= len([path for path in asked if path.startswith("/download") and "train-" in path]) <= 8
        assert np.array_equal(there.sequences(), here.sequences())
        assert not local.exists()
        shards.link(tmp_path / "run" / "data", place)
        assert len(shards.open_split(tmp_path / "run" / "data", "test")[1]) == 2
        del server.blobs["data/abc/test-00000.bin"]
        with pytest.raises(errors.UserError, match=r"gs://bucket/data/abc/test-00000.bin is missing"):
            shards.verify(place)
