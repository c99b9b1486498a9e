"""Tests of tokenizers: round trips, descriptions in JSON, and errors."""

import base64
import dataclasses
import io
import json
import string

import numpy as np
import pytest
import sentencepiece
import tiktoken

from sedd_jax.data import alphabets, subwords, tokenizers
from sedd_jax.runtime import errors
from tests.support import places

SHARED_RANKS = places.SHARED / "tokenizers" / "gpt2.tiktoken"


@pytest.fixture
def ranks_file(tmp_path):
    """A file of ranks in tiktoken's format: all single bytes and three merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"hel", b" w"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


@pytest.fixture
def vocabulary_file(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "to", "!", "cafe"]) + "\n")
    return path


@pytest.fixture(scope="module")
def pieces():
    text = "def f(x):\n    return x + 1  # naïve\n\n\n" * 50 + "".join(map(str, range(500)))
    return tokenizers.build("sentencepiece:300", lambda: [text, "class A:\n\tpass\n" * 50])


def _build(spec, *documents):
    return tokenizers.build(spec, lambda: documents)


def test_characters_take_the_sorted_alphabet_of_all_documents():
    tokenizer = _build("characters", "ba\n", "é𝄞")
    assert tokenizer == alphabets.Characters(alphabet="\nabé𝄞")
    assert (tokenizer.vocab_size, tokenizers.num_ids(tokenizer)) == (5, 5)
    assert (tokenizer.unit, tokenizer.mask_id, tokenizer.eos_id) == ("character", None, None)
    ids = tokenizer.encode("𝄞ab\né")
    assert ids.dtype == np.int32
    assert ids.tolist() == [4, 1, 2, 0, 3]
    assert tokenizer.decode(ids) == "𝄞ab\né"
    assert tokenizer.encode("").shape == (0,)


def test_text8_is_a_space_and_the_letters():
    tokenizer = _build("text8")
    assert tokenizer.vocab_size == 27
    assert tokenizer.encode(" az").tolist() == [0, 1, 26]
    assert tokenizer.decode(np.arange(27, dtype=np.uint16)) == " " + string.ascii_lowercase


def test_unknown_characters_are_named_with_their_position():
    with pytest.raises(ValueError, match=r"'É' \(U\+00C9\) at position 2 is not in the alphabet of 27.*remove it"):
        _build("text8").encode("abÉcÉ")


def test_ids_outside_the_vocabulary_are_named():
    with pytest.raises(ValueError, match=r"id 27 at position 1 is outside \[0, 27\)"):
        _build("text8").decode(np.array([0, 27]))
    with pytest.raises(ValueError, match=r"id -1 at position 0"):
        _build("text8").decode(np.array([-1]))


def test_ids_are_numbers_below_their_count():
    tokenizer = _build("ids:30")
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eos_id, tokenizer.unit) == (30, None, None, "token")
    ids = tokenizer.encode("3 29\n0")
    assert ids.dtype == np.int32
    assert ids.tolist() == [3, 29, 0]
    assert tokenizer.decode(ids) == "3 29 0"
    assert tokenizer.encode("").shape == (0,)
    for wrong in ("30", "-1", "three", "٣", "1" * 5000):
        with pytest.raises(errors.UserError, match=rf"'{wrong[:900]}.*' is not an id: give numbers from 0 to 29"):
            tokenizer.encode(f"3 {wrong}")
    with pytest.raises(ValueError, match=r"id 30 at position 0 is outside \[0, 30\)"):
        tokenizer.decode(np.array([30]))


@pytest.mark.parametrize("alphabet", ["", "aba"])
def test_alphabets_name_each_character_once(alphabet):
    with pytest.raises(ValueError, match="is empty or repeats"):
        alphabets.Characters(alphabet=alphabet)


@pytest.mark.parametrize("alphabet", ["a\ud800", "\udfff", "\udc80b"])
def test_alphabets_hold_what_can_be_written(alphabet, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "characters", "alphabet": alphabet}))
    with pytest.raises(errors.UserError, match=r"tokenizer.json.* alphabet holds '\\ud.*', half a surrogate pair"):
        tokenizers.read(tmp_path / "tokenizer.json")


def test_byte_pairs_merge_by_rank_and_round_trip(ranks_file):
    tokenizer = _build(f"gpt2:{ranks_file}")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.mask_id, tokenizer.unit) == (260, 259, None, "token")
    ids = tokenizer.encode("hello world")
    assert ids.dtype == np.int32
    assert ids.tolist() == [257, *b"lo", 258, *b"orld"]
    assert tokenizer.encode("a  world").tolist() == [*b"a ", 258, *b"orld"]
    for text in ("hello <|endoftext|> wörld 𝄞\n\n  it's 42!", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.array([259])) == "<|endoftext|>"
    with pytest.raises(ValueError, match=r"id 260 at position 0 is outside \[0, 260\)"):
        tokenizer.decode(np.array([260]))


def test_byte_pairs_say_when_their_file_is_gone_changed_or_broken(ranks_file, tmp_path):
    description = _build(f"gpt2:{ranks_file}").to_json()
    lines = ranks_file.read_bytes().splitlines(keepends=True)
    ranks_file.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"small.tiktoken have sha256 .*, not .*put the same file back"):
        tokenizers.from_json(description)
    for broken in (lines[:-2] + lines[-1:], [b"eno= 0\n", *lines[1:]]):  # without rank 257, without byte 0
        ranks_file.write_bytes(b"".join(broken))
        with pytest.raises(ValueError, match="lack a number or one of the 256 bytes"):
            tokenizers.from_json(description)
    ranks_file.write_bytes(b"not ranks at all\n")
    with pytest.raises(ValueError, match="is not a file of ranks"):
        tokenizers.from_json(description)
    ranks_file.unlink()
    with pytest.raises(errors.UserError, match=r"small.tiktoken does not exist"):
        tokenizers.from_json(description)


def test_fingerprints_follow_the_content_not_the_place(ranks_file, tmp_path):
    copy = tmp_path / "copy.tiktoken"
    copy.write_bytes(ranks_file.read_bytes())
    here, there = _build(f"gpt2:{ranks_file}"), _build(f"gpt2:{copy}")
    assert here != there
    assert here.fingerprint() == there.fingerprint()
    assert _build("text8").fingerprint() != _build("characters", "ab").fingerprint()


def test_every_kind_survives_json(ranks_file, vocabulary_file, pieces):
    specs = ("characters", "text8", "bytes", "ids:7", f"gpt2:{ranks_file}", f"wordpiece:{vocabulary_file}")
    for tokenizer in (pieces, *(_build(spec, "some text") for spec in specs)):
        stored = tokenizers.from_json(json.loads(json.dumps(tokenizer.to_json())))
        assert stored == tokenizer
        assert stored.fingerprint() == tokenizer.fingerprint()
    with pytest.raises(ValueError, match=r"kind='morse' is unknown.*characters"):
        tokenizers.from_json({"kind": "morse"})


def test_relative_paths_are_stored_whole(ranks_file, monkeypatch, tmp_path):
    monkeypatch.chdir(ranks_file.parent)
    description = _build(f"gpt2:{ranks_file.name}").to_json()
    monkeypatch.chdir(tmp_path.parent)
    assert tokenizers.from_json(description).vocab_size == 260


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("charcters", r"'charcters'.*did you mean 'characters'\?.*wordpiece:FILE"),
        ("wordpiece", "'wordpiece' lacks an argument"),
        ("text8:file", "'text8:file' lacks an argument, or has one too many"),
        ("gpt2:", "'gpt2:' lacks an argument"),
        ("ids:0", "'ids:0' names no number of tokens"),
        ("ids:many", "'ids:many' names no number of tokens"),
    ],
)
def test_wrong_specs_list_the_right_ones(spec, message):
    with pytest.raises(ValueError, match=message):
        _build(spec, "text")


def test_word_pieces_count_the_mask_apart(vocabulary_file):
    tokenizer = _build(f"wordpiece:{vocabulary_file}")
    assert (tokenizer.vocab_size, tokenizers.num_ids(tokenizer)) == (9, 10)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.unit) == (4, 3, "token")
    description = tokenizer.to_json()
    vocabulary_file.write_text("[UNK]\n[SEP]\n")
    with pytest.raises(ValueError, match=r"vocab.txt has sha256"):
        tokenizers.from_json(description)
    with pytest.raises(ValueError, match=r"vocab.txt lacks \[MASK\]"):
        _build(f"wordpiece:{vocabulary_file}")


def test_a_vocabulary_that_is_no_text_is_named(vocabulary_file):
    vocabulary_file.write_bytes(b"[UNK]\n\xff\n")
    with pytest.raises(errors.UserError, match=r"vocab.txt is not UTF-8 text .*0xff"):
        _build(f"wordpiece:{vocabulary_file}")


def test_long_white_space_gets_the_tokens_that_it_always_has(ranks_file, monkeypatch):
    tokenizer = _build(f"gpt2:{ranks_file}")
    blanks = [" ", "\n", "\t", "\xa0", "\u2003", "\u2028"]
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice([*blanks, *blanks, "a", "'s", "7", "!"], size=40)) for _ in range(300)]
    texts += ["   ", "a   ", "   a", "a   b", "a  \n\n b", "a \x1c\x1c\x1c b"]
    expected = [tokenizer.encode(text).tolist() for text in texts]
    for longest in (2, 3, 5):
        monkeypatch.setattr(subwords, "_LONGEST_BLANKS", longest)
        assert [tokenizer.encode(text).tolist() for text in texts] == expected


def test_ids_that_another_program_appended_to_gpt2s_stand_for_no_text(ranks_file, tmp_path):
    plain = _build(f"gpt2:{ranks_file}")
    tokenizer = dataclasses.replace(plain, num_unused=2)
    assert tokenizer.vocab_size == plain.vocab_size + 2
    assert tokenizer.special_ids == {259, 260, 261}
    assert tokenizer.encode("hello").tolist() == plain.encode("hello").tolist()
    assert tokenizer.decode(np.array([257, 259, 261])) == "hel<|endoftext|><|unused261|>"
    assert tokenizer.fingerprint() != plain.fingerprint()
    assert "num_unused" not in plain.to_json()  # as in run directories of earlier versions
    tokenizers.write(tokenizer, tmp_path / "tokenizer.json")
    assert tokenizers.read(tmp_path / "tokenizer.json").fingerprint() == tokenizer.fingerprint()
    with pytest.raises(errors.UserError, match="num_unused=500 is no count: give one from 0 to 127"):
        dataclasses.replace(plain, num_unused=500)


@pytest.mark.parametrize("blank", [" ", "\n", "\r\n"])
def test_a_document_with_a_million_blanks_is_tokenized(ranks_file, blank):
    """tiktoken cannot match its pattern there, and ends with what is no Exception."""
    text = f"a{blank * 1_500_000}b"
    tokenizer = _build(f"gpt2:{ranks_file}")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_is_cut_at_newlines_only(vocabulary_file):
    """BERT's Chinese vocabulary has a piece that is U+2028, at which str.splitlines cuts."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "\u2028", "\x85", "\x0b", "the", "a\u2029b"]
    for content in ("\n".join(pieces), "\n".join(pieces) + "\n", "\ufeff" + "\r\n".join(pieces) + "\r\n"):
        vocabulary_file.write_text(content, encoding="utf-8", newline="")
        tokenizer = _build(f"wordpiece:{vocabulary_file}")
        assert tokenizer.vocab_size == len(pieces) - 1
        assert tokenizer.encode("the").tolist() == [8]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[UNK]", "[SEP]", "[MASK]", "the", "cat", "the"], r"vocab.txt:6 repeats the piece 'the' of line 4"),
        (["[UNK]", "[SEP]", "", "[MASK]", "the"], r"vocab.txt:3 is empty, so ids after it are uncertain"),
        (["[UNK]", "[SEP]", "[MASK]", "the", "", ""], r"vocab.txt:5 is empty"),
    ],
)
def test_a_vocabulary_whose_ids_are_uncertain_is_refused(vocabulary_file, lines, message):
    vocabulary_file.write_text("\n".join(lines) + "\n")
    with pytest.raises(errors.UserError, match=message):
        _build(f"wordpiece:{vocabulary_file}")


def test_ids_that_are_no_tokens_are_refused(vocabulary_file):
    tokenizer = _build(f"wordpiece:{vocabulary_file}")
    tokenizers.check_encoded(np.array([0, 3, 9]), tokenizer)
    for wrong in (10, -1, 4):
        with pytest.raises(errors.UserError, match=f"id {wrong} is no token .* ids below 10, of which 4 is the mask"):
            tokenizers.check_encoded(np.array([0, wrong]), tokenizer)
    with pytest.raises(
        errors.UserError, match="id 256 is no token of this tokenizer, which has ids below 256: prepare"
    ):
        tokenizers.check_encoded(np.array([[256]]), _build("bytes"))


def test_ranks_that_cannot_be_fetched_are_an_error_with_a_remedy(monkeypatch):
    def get_encoding(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(errors.UserError, match=r"cannot fetch them \(no network\): .*gpt2:FILE.* TIKTOKEN_CACHE_DIR"):
        _build("gpt2")


def test_word_pieces_encode_and_decode(vocabulary_file):
    pytest.importorskip("tokenizers", reason="word pieces need pip install tokenizers")
    tokenizer = _build(f"wordpiece:{vocabulary_file}")
    ids = tokenizer.encode("Unable to CAFÉ! zebra")
    assert ids.dtype == np.int32
    assert ids.tolist() == [5, 6, 7, 9, 8, 1]
    assert tokenizer.decode(ids[:5]) == "unable to cafe!"


@pytest.mark.skipif(not SHARED_RANKS.exists(), reason="GPT-2's ranks lie in ../shared, which is absent")
def test_gpt2_ranks_give_the_known_ids():
    tokenizer = _build(f"gpt2:{SHARED_RANKS}")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)
    assert tokenizers.fingerprint("gpt2") == tokenizer.fingerprint()
    assert tokenizer.encode("Hello world, it's 2023!\n\n").tolist() == [15496, 995, 11, 340, 338, 1160, 1954, 0, 628]


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("gpt2", 50257),
        ("wordpiece:vocab.txt", 30521),
        ("ids:77", 77),
        ("bytes", 256),
        ("sentencepiece:8000", 8000),
    ],
)
def test_vocabulary_of_a_tokenizer_needs_no_file(spec, size):
    assert tokenizers.vocab_size_of(spec) == size


def test_bytes_are_utf8():
    tokenizer = _build("bytes")
    assert (tokenizer.vocab_size, tokenizer.unit, tokenizer.mask_id, tokenizer.eos_id) == (256, "byte", None, None)
    ids = tokenizer.encode("é\0𝄞")
    assert ids.dtype == np.int32
    assert ids.tolist() == list("é\0𝄞".encode())
    assert tokenizer.decode(ids) == "é\0𝄞"
    assert tokenizer.decode(ids[1:].astype(np.uint16)) == "\ufffd\0𝄞"
    with pytest.raises(ValueError, match=r"id 256 at position 0 is outside \[0, 256\)"):
        tokenizer.decode(np.array([256]))
    with pytest.raises(errors.UserError, match=r"'\\ud800' at position 1 is half a surrogate pair: remove it"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("kind", ["gpt2", "wordpiece", "sentencepiece"])
def test_half_a_surrogate_pair_is_no_text_for_subwords(kind, ranks_file, vocabulary_file, pieces):
    """It comes from arguments that are not UTF-8, and from escapes in JSON."""
    files = {"gpt2": ranks_file, "wordpiece": vocabulary_file}
    tokenizer = _build(f"{kind}:{files[kind]}") if kind in files else pieces
    for text in ("to\udcff", "to\ud800 to"):
        with pytest.raises(errors.UserError, match=r"'\\ud.*' at position 2 is half a surrogate pair: remove it"):
            tokenizer.encode(text)


def test_learned_pieces_give_every_text_back(pieces):
    assert (pieces.vocab_size, pieces.mask_id, pieces.eos_id, pieces.unk_id) == (300, None, 1, 0)
    assert len(pieces.encode("    return x")) < len("    return x")
    known = [
        "  a",
        " a  b ",
        "\n\n\tx\r\n",
        "a\0b",
        "é𝄞\u2028",
        "▁▂▃ ▁",
        "</s><unk><0x0A>",
        "\ufeff",
        "",
        " ",
        "\u200b",
    ]
    random = np.random.default_rng(0)
    kinds = ([32, 10, 9], range(1, 0x300), range(0x2000, 0x3000), range(0x1F600, 0x1F650), range(32, 127))
    drawn = ["".join(chr(random.choice(kinds[kind])) for kind in random.integers(0, 5, 20)) for _ in range(300)]
    for text in known + drawn:
        ids = pieces.encode(text)
        assert ids.dtype == np.int32
        assert not {pieces.eos_id, pieces.unk_id} & set(ids.tolist())
        assert pieces.decode(ids) == text


def test_pieces_write_the_end_of_a_text_by_its_name(pieces):
    ids = [*pieces.encode("  a"), pieces.eos_id, *pieces.encode(" b"), pieces.eos_id]
    assert pieces.decode(np.array(ids)) == "  a</s> b</s>"
    with pytest.raises(ValueError, match=r"id 300 at position 0 is outside \[0, 300\)"):
        pieces.decode(np.array([300]))


def test_pieces_of_a_file_keep_their_unknown_and_their_mask(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b ab ba " * 20]),
        model_writer=model,
        vocab_size=12,
        hard_vocab_limit=False,
        control_symbols=["[MASK]"],
        minloglevel=2,
    )
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    tokenizer = _build(f"sentencepiece:{path}")
    names = [tokenizer._processor.id_to_piece(id_) for id_ in range(tokenizers.num_ids(tokenizer))]
    assert names[tokenizer.mask_id] == "[MASK]"
    assert tokenizer.vocab_size == len(names) - 1
    assert tokenizer.decode(np.array([tokenizer.mask_id])) == "[MASK]"
    for unknown in ("aza", "a▁a"):
        assert tokenizer.encode(unknown).tolist().count(tokenizer.unk_id) == 1
    path.write_bytes(b"no model")


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "wordpiece"])
@pytest.mark.parametrize("content", [b"no model", b"", None])
def test_a_file_that_is_no_vocabulary_is_named(tmp_path, kind, content):
    path = tmp_path / "other.file"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(errors.UserError, match=r"^[^:]*/other\.file"):
        _build(f"{kind}:{path}")


def test_a_damaged_model_of_pieces_is_named_by_the_file_that_holds_it(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"kind": "sentencepiece", "model": "bm8gbW9kZWw="}))
    with pytest.raises(errors.UserError, match=rf"^{path}: this is no SentencePiece model: give the \.model file"):
        tokenizers.read(path)


def test_rare_characters_take_no_piece_but_come_back():
    text = "".join(map(chr, range(0x4E00, 0x5E00)))
    tokenizer = _build("sentencepiece:300", "".join(f"a common line {number}\n" for number in range(1_000_000)), text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_pieces_that_a_text_has_not_are_an_error():
    for number in (5000, 99_999_999_999):
        with pytest.raises(errors.UserError, match=rf"cannot make {number} pieces of this text .*give more text"):
            _build(f"sentencepiece:{number}", "a little text")


def test_only_some_tokenizers_depend_on_the_text():
    specs = ("characters", "sentencepiece:300", "sentencepiece:a.model", "bytes", "gpt2", "text8")
    assert [tokenizers.is_learned(spec) for spec in specs] == [True, True, False, False, False, False]


def test_a_file_far_too_long_for_a_tokenizer_is_not_read(tmp_path):
    with (tmp_path / "ranks").open("wb") as file:
        file.truncate(10**12)  # It takes no place on the disk.
    with pytest.raises(errors.UserError, match="ranks has 1000000000000 bytes, more than the 67108864 of any"):
        tokenizers.build(f"gpt2:{tmp_path / 'ranks'}", lambda: iter(()))
