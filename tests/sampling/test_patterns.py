"""Automata over tokens accept the sequences whose decoded text matches, for every tokenizer that has text."""

import base64
import io
import itertools
import re
import tracemalloc

import numpy as np
import pytest
import sentencepiece

from sedd_jax.data import alphabets, subwords, tokenizers
from sedd_jax.diffusion import graphs
from sedd_jax.sampling import patterns
from tests.support import places, slow

SHARED_RANKS = places.SHARED / "tokenizers" / "gpt2.tiktoken"


def _characters(tmp_path):
    return alphabets.Characters(alphabet="\nabc é𝄞")


def _bytes(tmp_path):
    return alphabets.Bytes()


def _byte_pairs(tmp_path):
    """All single bytes, of which the first is not text, and pairs, of which some are not UTF-8."""
    tokens = [bytes([(0xC3 + rank) % 256]) for rank in range(256)] + [
        b"ab",
        b"abb",
        b" a",
        "é".encode(),
        b"a\xc3",
        b"\xa9b",
    ]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return subwords.gpt2(str(path))


def _word_pieces(tmp_path):
    pytest.importorskip("tokenizers", reason="word pieces need pip install tokenizers")
    pieces = ["[PAD]", "a", "[UNK]", "[SEP]", "[MASK]", "##b", "b", ".", "'", "##.", "[", "]", "[unused1]", "é"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n")
    return subwords.word_piece(str(path))


def _pieces(tmp_path):
    """A model as others make it: a space before the text, special pieces such as a mask, bytes for other characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b ab ba é " * 20]),
        model_writer=model,
        vocab_size=280,
        hard_vocab_limit=False,
        byte_fallback=True,
        control_symbols=["<pad>"],
        user_defined_symbols=["<b>", "[MASK]"],
        minloglevel=2,
    )
    return subwords.SentencePiece(model=base64.b64encode(model.getvalue()).decode())


def _learned_pieces(tmp_path):
    return subwords.learn_sentence_piece(270, ["a b  ab\nba é " * 20])


BUILDERS = {
    "characters": _characters,
    "bytes": _bytes,
    "byte_pairs": _byte_pairs,
    "word_pieces": _word_pieces,
    "pieces": _pieces,
    "learned_pieces": _learned_pieces,
}
# Number of ids that are text, and of ids that are not.
NUM_TEXTS = {
    "characters": (7, 0),
    "bytes": (128, 128),
    "byte_pairs": (128 + 4, 128 + 2 + 1),
    "word_pieces": (9, 5),
}


@pytest.fixture(params=BUILDERS)
def tokenizer(request, tmp_path):
    return BUILDERS[request.param](tmp_path)


def _graph(tokenizer) -> graphs.Absorbing:
    mask_id = tokenizer.vocab_size if tokenizer.mask_id is None else tokenizer.mask_id
    return graphs.Absorbing(vocab_size=tokenizer.vocab_size, mask_id=mask_id)


def _accepts(automaton, state, ids) -> bool:
    for id_ in ids:
        state = automaton.next_state[state, automaton.class_of[id_]]
    return bool(automaton.is_accepting[state])


def _seen(texts: tuple[str, ...]) -> int:
    return next(id_ for id_, text in enumerate(texts) if text.strip())


def test_texts_in_a_row_are_what_decoding_gives(tokenizer):
    texts = patterns.token_texts(tokenizer)
    before = _seen(texts)
    ids = [id_ for id_, text in enumerate(texts) if text]
    random = np.random.default_rng(0)
    for _ in range(300):
        drawn = random.choice(ids, 8)
        whole = tokenizer.decode(np.array([before, *drawn]))
        assert whole == tokenizer.decode(np.array([before])) + "".join(texts[id_] for id_ in drawn)


@pytest.mark.parametrize("name", NUM_TEXTS)
def test_what_is_no_text_is_left_out(name, tmp_path):
    texts = patterns.token_texts(BUILDERS[name](tmp_path))
    assert (sum(map(bool, texts)), texts.count("")) == NUM_TEXTS[name]


def test_special_pieces_are_left_out(tmp_path):
    tokenizer = _pieces(tmp_path)
    texts = patterns.token_texts(tokenizer)
    names = [tokenizer._processor.id_to_piece(id_) for id_ in range(len(texts))]
    without = {name for name, text in zip(names, texts, strict=True) if not text}
    assert without == {"<unk>", "<s>", "</s>", "<pad>", "[MASK]", *(f"<0x{byte:02X}>" for byte in range(128, 256))}
    assert texts[names.index("<b>")] == "<b>"
    assert texts[names.index("<0x41>")] == "A"
    assert texts[names.index("▁a")] == " a"


@pytest.mark.parametrize(
    "pattern",
    slow.all_but(
        ["( ?(a|b)+)+", "[^a]*", r"\s?a\w*"],
        ["[ab]+", "( ?(a|b)+)+", r"( a|\.|b)*é?", "[^a]*", ".*", r"\s?a\w*", "[A<b>]+"],
    ),
)
def test_accepted_is_what_matches_when_decoded(tokenizer, pattern):
    """All sequences of up to three of some tokens: texts, parts of characters, and special tokens."""
    graph = _graph(tokenizer)
    texts = patterns.token_texts(tokenizer)
    automaton, initial = patterns.compile([pattern], tokenizer, graph)
    assert automaton.class_of.shape == (graph.num_states,)
    short = [id_ for id_, text in enumerate(texts) if set(text) & set("abcé .\nA<")]
    without = [id_ for id_, text in enumerate(texts) if not text]
    some = {*short[:9], *short[-3:], *without[:2], *without[-2:], graph.mask_id}
    before = tokenizer.decode(np.array([_seen(texts)]))
    found = []
    for length in range(4):
        for ids in itertools.product(sorted(some), repeat=length):
            is_text = all(id_ < len(texts) and texts[id_] for id_ in ids)
            expected = is_text and re.fullmatch(
                pattern, tokenizer.decode(np.array([_seen(texts), *ids], np.int32)).removeprefix(before)
            )
            found.append(bool(expected))
            assert _accepts(automaton, initial[pattern].within, ids) == bool(expected), ids
            # A space that decoding drops at the start is not text, so it is never drawn there.
            begins = is_text and all(patterns.first_texts(tokenizer)[id_] for id_ in ids[:1])
            expected = begins and re.fullmatch(pattern, tokenizer.decode(np.array(ids, np.int32)))
            assert _accepts(automaton, initial[pattern].first, ids) == bool(expected), ids
    assert 0 < sum(found) < len(found)


@pytest.mark.parametrize("name", ["word_pieces", "pieces"])
def test_a_gap_at_the_start_of_a_text_needs_no_space(name, tmp_path):
    tokenizer = BUILDERS[name](tmp_path)
    automaton, initial = patterns.compile(["a b", " b"], tokenizer, _graph(tokenizer))
    start = lambda *gaps: patterns.place([patterns.Gap(*gap) for gap in gaps], 9, automaton, initial).start
    assert start((0, 2, "a b"), (2, 1, " b")).tolist()[:3] == [initial["a b"].first, -1, initial[" b"].within]
    assert _accepts(automaton, initial["a b"].first, tokenizer.encode("a b"))
    assert not _accepts(automaton, initial["a b"].within, tokenizer.encode("a b"))
    assert _accepts(automaton, initial[" b"].within, tokenizer.encode("b"))
    patterns.check(patterns.Gap(1, 1, " b"), automaton, initial)
    with pytest.raises(ValueError, match=r"\{1: b\} cannot be filled"):
        patterns.check(patterns.Gap(0, 1, " b"), automaton, initial)
    # The two gaps are of different kinds, so a check of each kind checks both.
    assert len(patterns.kinds([patterns.Gap(0, 1, " b"), patterns.Gap(1, 1, " b"), patterns.Gap(5, 1, " b")])) == 2


def test_patterns_share_one_automaton(tmp_path):
    """Each pattern has its own states, and tokens that any pattern tells apart are in different classes."""
    tokenizer = _characters(tmp_path)
    several = ["[ab]+", "ac|é", "[ab]+", "c{2,3}"]
    automaton, initial = patterns.compile(several, tokenizer, _graph(tokenizer))
    assert list(initial) == ["[ab]+", "ac|é", "c{2,3}"]
    assert len(set(automaton.class_of)) == automaton.num_classes == 5  # a, b, c, é, and the rest with the mask
    assert automaton.class_of[tokenizer.encode("\n𝄞")].tolist() == [automaton.class_of[-1]] * 2
    reached = []
    for pattern, (state, _) in initial.items():
        alone, at = patterns.compile([pattern], tokenizer, _graph(tokenizer))
        for length in range(5):
            for ids in itertools.product(range(8), repeat=length):
                assert _accepts(automaton, state, ids) == _accepts(alone, at[pattern].within, ids)
        states = {state}
        for _ in automaton.next_state:
            states |= {int(after) for before in states for after in automaton.next_state[before]}
        reached.append(states - {0})
    assert sum(map(len, reached)) == len(set.union(*reached)) == len(automaton.next_state) - 1


def test_the_mask_may_be_any_state_and_is_never_allowed(tmp_path):
    """The uniform graph, which has no mask, has the same classes."""
    tokenizer = _word_pieces(tmp_path)
    for graph in (_graph(tokenizer), graphs.Uniform(vocab_size=tokenizer.vocab_size + 1)):
        automaton, initial = patterns.compile([".+"], tokenizer, graph)
        after = automaton.next_state[initial[".+"].within, automaton.class_of]
        assert np.flatnonzero(after == 0).tolist() == [0, 2, 3, 4, 12]


def test_gaps_are_placed(tmp_path):
    tokenizer = _characters(tmp_path)
    automaton, initial = patterns.compile(["a+", "b|cc"], tokenizer, _graph(tokenizer))
    gaps = [patterns.Gap(1, 3, "a+"), patterns.Gap(4, 1, "b|cc"), patterns.Gap(6, 2, "b|cc")]
    places = patterns.place(gaps, 9, automaton, initial)
    first, second = initial["a+"].within, initial["b|cc"].within
    assert places.start.tolist() == [-1, first, -1, -1, second, -1, second, -1, -1]
    assert places.is_last.astype(int).tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 0]
    assert places.is_constrained.astype(int).tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("pattern", "length", "message"),
    [
        ("abc|babab", 4, r"\{4:abc\|babab\} cannot be filled: no text of 4 tokens matches, texts of 3 or 5 do"),
        ("abc|babab", 2, "no text of 2 tokens matches, texts of 3 do"),
        ("abc|babab", 9, "no text of 9 tokens matches, texts of 5 do"),
        ("(aaa)+", 100, "texts of 99 or 102 do"),
        ("(a{7})*", 1, "no text of 1 tokens matches, texts of 7 do"),
        ("x+", 3, "no text of 3 tokens matches, and none of any other number"),
        ("", 1, "and none of any other number"),
    ],
)
def test_gaps_that_no_text_fills_name_the_nearest_that_one_does(pattern, length, message, tmp_path):
    tokenizer = _characters(tmp_path)
    automaton, initial = patterns.compile([pattern], tokenizer, _graph(tokenizer))
    with pytest.raises(ValueError, match=message):
        patterns.check(patterns.Gap(0, length, pattern), automaton, initial)


def test_a_gap_without_tokens_matches_a_pattern_of_nothing(tmp_path):
    tokenizer = _characters(tmp_path)
    automaton, initial = patterns.compile(["a*", "a+"], tokenizer, _graph(tokenizer))
    for start in (0, 4, 9):
        patterns.check(patterns.Gap(start, 0, "a*"), automaton, initial)
        places = patterns.place([patterns.Gap(start, 0, "a*")], 9, automaton, initial)
        assert not (places.is_constrained | places.is_last).any()
        assert (places.start == -1).all()
        with pytest.raises(ValueError, match="no text of 0 tokens matches, texts of 1 do"):
            patterns.check(patterns.Gap(start, 0, "a+"), automaton, initial)


def test_lengths_count_tokens_not_characters(tmp_path):
    tokenizer = _byte_pairs(tmp_path)
    automaton, initial = patterns.compile(["abb abb"], tokenizer, _graph(tokenizer))
    for length in range(3, 8):
        patterns.check(patterns.Gap(0, length, "abb abb"), automaton, initial)
    with pytest.raises(ValueError, match="no text of 2 tokens matches, texts of 3 do"):
        patterns.check(patterns.Gap(0, 2, "abb abb"), automaton, initial)


def test_many_patterns_are_checked_in_little_memory(tmp_path):
    """A list of prompts may have a different pattern on each line."""
    tokenizer = _characters(tmp_path)
    many = ["[abc]{1,60}" + "".join(word) + "[abc]*" for word in itertools.product("abc", repeat=4)]
    automaton, initial = patterns.compile(many, tokenizer, _graph(tokenizer))
    assert len(automaton.next_state) > 10_000
    tracemalloc.start()
    for pattern in many:
        patterns.check(patterns.Gap(3, 30, pattern), automaton, initial)
    with pytest.raises(ValueError, match="no text of 4 tokens matches, texts of 5 do"):
        patterns.check(patterns.Gap(3, 4, many[-1]), automaton, initial)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_what_needs_too_much_is_refused(tmp_path, monkeypatch):
    tokenizer = _characters(tmp_path)
    with pytest.raises(ValueError, match=r"a pattern is about text, and this run has ids only"):
        patterns.compile(["a"], alphabets.Ids(vocab_size=7), graphs.Absorbing(vocab_size=7, mask_id=7))
    with pytest.raises(ValueError, match=r"the pattern 'a\(' is no regular expression"):
        patterns.compile(["a", "a("], tokenizer, _graph(tokenizer))
    monkeypatch.setattr(patterns, "_MAX_TABLE", 12)
    patterns.compile(["ab"], tokenizer, _graph(tokenizer))
    with pytest.raises(ValueError, match=r"'ab', 'c' need 6 states by 4 kinds of tokens, more than 12"):
        patterns.compile(["ab", "c"], tokenizer, _graph(tokenizer))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_RANKS.exists(), reason="GPT-2's ranks lie in ../shared, which is absent")
def test_gpt2_spells_a_word_in_few_tokens_or_many():
    tokenizer = tokenizers.build(f"gpt2:{SHARED_RANKS}", lambda: ())
    pattern = "( cat| horse){2}|naïve"
    automaton, initial = patterns.compile([pattern], tokenizer, _graph(tokenizer))
    state = initial[pattern].within
    for text in (" cat horse", " horse horse", "naïve"):
        assert _accepts(automaton, state, tokenizer.encode(text))
        assert not _accepts(automaton, state, tokenizer.encode(text + "."))
    assert _accepts(automaton, state, [tokenizer.encode(char)[0] for char in " cat cat"])
    assert not _accepts(automaton, state, [*tokenizer.encode(" cat cat"), tokenizer.eos_id])
    assert automaton.class_of[tokenizer.eos_id] == automaton.class_of[-1]
    patterns.check(patterns.Gap(0, 2, pattern), automaton, initial)
