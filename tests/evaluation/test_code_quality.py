"""Windows of code parse where their whole statements are Python, and gaps are refilled in windows that do."""

import dataclasses
import json

import numpy as np
import pytest

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.data import tokenizers
from sedd_jax.evaluation import code_quality


@pytest.mark.parametrize(
    ("window", "code"),
    [
        ("t = 1\na = 2\nb = 3\nc =", "a = 2"),
        ("rn x\n\n    def f(self):\n        return 1\n\n    x = 2\n    y", "def f(self):\n    return 1\n"),
        ("\nif a:\n    b\nelse:\n    c\nd\ne", "if a:\n    b\nelse:\n    c"),
        ("\nf(\n    1,\n)\ng(\n", "f(\n    1,\n)"),
        ("\na\n@b\n@c\ndef f():\n    pass\n", "a"),
        ("x\n    a\n    b\n", "a"),
        ("one line", ""),
        ("two\nlines", ""),
        ("", ""),
        ("a\n\n\n\nb", ""),
    ],
)
def test_whole_statements_are_those_between_the_cuts(window, code):
    assert code_quality.whole_statements(window) == code


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("\na = 1\nb = 2\n", True),
        ("\na = = 1\nb = 2\n", False),
        ("\n# a\n# b\n# c\n", False),
        ('in a string.\n    Words of it.\n    """\n    x = 1\n    y = 2\n', True),
        ('\ns = """\nb = 2\n', False),
        ("\na = 1\\x\nb = 2\n", False),
        ("\na = '\0'\nb = 2\n", False),
        ("\na = " + "(" * 500 + ")" * 500 + "\nb\n", False),
        ("\nprint 1\nb = 2\n", False),
        ("\nx = '\\d'\nb = 2\n", True),
    ],
)
def test_windows_parse_where_their_statements_are_python(window, expected):
    assert code_quality.parses(window) is expected


@pytest.mark.slow
def test_shares_are_of_held_out_text_samples_and_refilled_gaps(code_run, capsys):
    assert cli.main(["eval", f"--workdir={code_run}", "--code", "--num_samples=8", "--num_processes=1", "--json"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["held_out"]["windows"] == runs.load(code_run).split("valid").num_sequences
    assert 0.4 < result["held_out"]["share"] < 0.8
    assert (result["gap"], result["nfe"]) == (4, 5)
    for name in ("samples", "refilled", "gap_closed"):
        assert result[name]["windows"] == 8
    assert "4 tokens refilled" in printed
    assert cli.main(["eval", f"--workdir={code_run}", "--code", "--num_samples=500", "--num_processes=1"]) == 1
    assert "held-out windows parse: ask for --num_samples=" in capsys.readouterr().err


def test_text_that_is_no_code_is_called_that(code_run, monkeypatch, capsys):
    monkeypatch.setattr(code_quality, "parses", lambda window: False)
    assert cli.main(["eval", f"--workdir={code_run}", "--code", "--num_samples=8", "--num_processes=1"]) == 1
    error = capsys.readouterr().err
    assert f"held-out windows of {code_run} parses: measure a run whose text is Python" in error
    assert "num_samples" not in error


@pytest.mark.slow
def test_an_autoregressive_run_has_samples_and_no_gaps(judge_run, capsys):
    assert cli.main(["eval", f"--workdir={judge_run}", "--code", "--num_samples=8", "--num_processes=1", "--json"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["samples"]["windows"] == 8
    assert "refilled" not in printed
    assert "gap_closed" not in result


def test_what_surrounds_a_gap_is_kept_and_the_gap_is_drawn(code_run, monkeypatch):
    drawn = []
    draw = code_quality.generate.draw_tokens

    def recorded(opened, given, *args, **kwargs):
        drawn.append((given, draw(opened, given, *args, **kwargs)))
        return drawn[-1][1]

    monkeypatch.setattr(code_quality.generate, "draw_tokens", recorded)
    code_quality.measure(code_run, num_samples=8)
    (nothing, _), (around, filled) = drawn
    assert not nothing.is_given.any()
    assert around.is_given.sum(axis=1).tolist() == [28] * 8
    assert not around.is_given[:, 14:18].any()
    given = np.asarray(around.is_given)
    assert (filled == np.asarray(around.tokens))[given].all()
    assert (filled != np.asarray(around.tokens))[~given].any()


def test_the_end_of_a_document_ends_a_line(code_run):
    pieces = tokenizers.build("sentencepiece:300", lambda: [f"name_{number} = {number}\n" for number in range(5000)])
    tokens = np.array([*pieces.encode("  a"), pieces.eos_id, *pieces.encode(" bc"), pieces.eos_id])
    ended = dataclasses.replace(runs.load(code_run), tokenizer=pieces)
    assert code_quality._text(ended, tokens) == "  a\n bc\n"


def test_of_a_single_window_there_is_no_error():
    assert code_quality._share([True]) == {"share": 1.0, "stderr": None, "windows": 1}
