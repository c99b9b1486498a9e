"""`sedd eval --conditional`: continuations and choices in a file, their likelihoods, ranking and accuracy."""

import json
import shutil

import numpy as np
import pytest

from sedd_jax.bounds import continuations
from sedd_jax.cli import main as cli
from sedd_jax.data import alphabets
from sedd_jax.evaluation import conditionals

LINES = [
    {"context": "a = 1\n", "continuation": "b = 22\n"},
    {"context": "a = ", "choices": ["1\n", "b = 22\nb = 22\n"], "answer": 0},
    {"context": "", "choices": ["a", "b", "1"], "answer": 2},
    {"context": "a = 1\nb = 22\n" * 3, "choices": ["a = 1", "1 = a"]},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def _copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))


def test_lines_are_bounded_choices_ranked_and_answers_counted(code_run, file, tmp_path, capsys):
    run = _copied(code_run, tmp_path)
    arguments = ["--num_processes=1", "--num_times=64", "--json"]
    assert cli.main(["eval", f"--workdir={run}", f"--conditional={file}", *arguments]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert "\n".join(shown) == str(conditionals.table(result))
    assert max(map(len, shown[1:])) <= 110
    first, second, third, cut = result["items"]
    assert (first["context_tokens"], first["tokens"], first["num_times"]) == (6, [7], 64)
    assert first["log_likelihoods"][0] < 0 < first["stderrs"][0]
    assert second["tokens"] == [2, 14]
    assert (second["best"], second["is_decided"]) == (0, True)
    assert second["lead"] == pytest.approx(second["log_likelihoods"][0] - second["log_likelihoods"][1])
    assert third["context_tokens"] == 0
    assert (cut["context_tokens"], cut["cut_tokens"]) == (27, 12)
    right = [second["best"] == 0, third["best"] == 2]
    assert result["accuracy"] == np.mean(right)
    assert result["num_answers"] == 2
    assert "what follows the continuation stays masked and does not count" in shown[1]
    assert "1 contexts were longer" in shown[-1]
    # Finished lines are kept, and the report shows them.
    (kept,) = (run / "evaluations").glob("conditional-*.jsonl")
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:2]))
    assert conditionals.measure(run, str(file), budget=continuations.Budget(num_times=64))["items"] == result["items"]
    assert cli.main(["eval", f"--workdir={run}", "--report", "--num_processes=1"]) == 0
    assert "Likelihood of continuations" in (run / "report.html").read_text()


@pytest.mark.slow
def test_an_autoregressive_run_gives_the_likelihood_itself(judge_run, file, tmp_path):
    run = _copied(judge_run, tmp_path)
    result = conditionals.measure(run, str(file))
    assert len(result["items"]) == len(LINES)
    for item in result["items"]:
        assert set(item["stderrs"]) == {0.0}
        assert item["is_decided"]
        assert item["num_times"] == 0
    whole = result["items"][0]["log_likelihoods"][0]
    # The chain rule: p(b = 22 | a) = p(b | a) p( = 22 | b).
    halves = [{"context": "a = 1\n", "continuation": "b ="}, {"context": "a = 1\nb =", "continuation": " 22\n"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in halves))
    parts = [item["log_likelihoods"][0] for item in conditionals.measure(run, str(file))["items"]]
    assert sum(parts) == pytest.approx(whole, abs=1e-4)
    assert "exact" in str(conditionals.table(result))
    assert "lower bounds" not in str(conditionals.table(result))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1: this line is not JSON"),
        ("[]", ":1: this line does not have a context and a continuation, or choices, as text"),
        ('{"context": "a"}', ":1: this line does not have a context and a continuation, or choices, as text"),
        ('{"context": "a", "choices": ["b"]}', ":1: this line has fewer than two choices"),
        ('{"context": "a", "choices": ["b", "1"], "continuation": "a"}', ":1: this line has a continuation beside"),
        ('{"context": "a", "choices": ["b", "1"], "answer": 2}', ":1: this line has the answer 2, which is not the"),
        ('{"context": "a", "choices": ["b", "1"], "answer": true}', ":1: this line has the answer True, which is"),
        ('{"context": "a", "continuation": ""}', ":1: a continuation has no tokens: give another"),
        ('{"context": "a", "continuation": "' + "a" * 33 + '"}', ":1: a continuation has 33 tokens, and the run's"),
        ('{"context": "Z", "continuation": "a"}', ":1: 'Z' (U+005A) at position 0 is not in the alphabet"),
        ("", "has no line in it"),
    ],
)
def test_lines_that_cannot_be_are_named(code_run, tmp_path, capsys, line, message):
    (tmp_path / "wrong.jsonl").write_text(line)
    assert (
        cli.main(["eval", f"--workdir={code_run}", f"--conditional={tmp_path}/wrong.jsonl", "--num_processes=1"]) == 1
    )
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_that_is_not_there_is_named(code_run, tmp_path, capsys):
    assert cli.main(["eval", f"--workdir={code_run}", f"--conditional={tmp_path}/none", "--num_processes=1"]) == 1
    assert f"--conditional={tmp_path}/none is not a file: give one with lines of" in capsys.readouterr().err
    assert cli.main(["eval", f"--workdir={code_run}", "--conditional=x", "--protocol=strict", "--num_processes=1"]) == 2
    assert "--protocol has no meaning with --conditional" in capsys.readouterr().err


class Words(alphabets.Ids):
    """A tokenizer of words with the spaces before them, which a space at the end of a context cuts apart."""

    eos_id = 0

    def encode(self, text):
        found = [word for word in text.replace(" ", "\0 ").split("\0") if word]
        return np.array([1 + int.from_bytes(word.encode(), "little") % 9973 for word in found], np.int64)


def test_the_text_is_tokenized_as_a_whole_where_it_can_be():
    words = Words(vocab_size=10000)
    encode = words.encode
    (part,), cut = continuations.encode(words, 6, "the cat", [" sat down"])
    assert part.tokens.tolist() == [0, *encode("the cat sat down")]
    assert (part.start, cut) == (3, 0)
    # The space goes with the word after it.
    (part,), _ = continuations.encode(words, 6, "the cat ", ["sat down"])
    assert part.tokens.tolist() == [0, *encode("the cat sat down")]
    assert part.start == 3
    # Nothing but apart.
    (part,), _ = continuations.encode(words, 6, "the ca", ["t sat"])
    assert part.tokens.tolist() == [0, *encode("the ca"), *encode("t sat")]
    assert part.start == 3
    # All choices lose as much of the context, its start and the end of text before it.
    parts, cut = continuations.encode(words, 6, "a b c d", [" e", " e f g"])
    assert [part.start for part in parts] == [3, 3]
    assert parts[0].tokens.tolist() == [*encode("a b c d e")[1:]]
    assert cut == 2


def test_of_a_single_answer_there_is_no_error():
    assert conditionals._accuracy([{"best": 1, "answer": 1}])["accuracy_stderr"] is None
    two = conditionals._accuracy([{"best": 1, "answer": 1}, {"best": 0, "answer": 1}])
    assert two["accuracy_stderr"] == pytest.approx(0.5 / 2**0.5)
