"""Tests of the corpora that come with CPython: complete, in order, and without held-out text in train."""

import ast
import subprocess
import sys

import pytest

from sedd_jax.data import documents, python_corpora


def _read(name, split):
    return [document.text for document in python_corpora.read(name).read(split)]


def _paragraphs(split):
    return {" ".join(part.split()) for text in _read("docs", split) for part in text.split("\n\n")}


@pytest.mark.slow
def test_python_docs_hold_out_about_a_twentieth_each():
    sizes = {split: sum(map(len, _read("docs", split))) for split in documents.SPLITS}
    assert sum(sizes.values()) > 1_500_000
    for split in ("valid", "test"):
        assert 0.03 < sizes[split] / sum(sizes.values()) < 0.09


@pytest.mark.slow
def test_python_docs_share_no_paragraph_between_splits():
    train, valid, test = map(_paragraphs, documents.SPLITS)
    assert not train & valid
    assert not (train | valid) & test


@pytest.mark.slow
def test_python_docs_keep_a_small_alphabet():
    text = "".join("".join(_read("docs", split)) for split in documents.SPLITS)
    assert set(text) == {chr(code) for code in range(32, 127)} | {"\n"}
    assert " \n" not in text


@pytest.mark.slow
def test_python_docs_are_the_same_in_another_process():
    command = (
        "import hashlib; from sedd_jax.data import python_corpora; "
        "texts = [document.text for document in python_corpora.read('docs').read('valid')]; "
        "print(hashlib.sha256('|'.join(texts).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", command],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_docstrings_are_parsed_not_run_and_unparsable_files_are_skipped(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        '"""Top."""\nraise SystemExit\nclass A:\n    """Of A."""\n    def f(self):\n        """Top."""\n    x = "\\d"\n'
    )
    assert python_corpora._docstrings(module) == ["Top.", "Of A."]
    module.write_text("print 'two'\n")
    assert python_corpora._docstrings(module) == []


def test_paragraphs_spell_out_typography_and_skip_other_alphabets():
    texts = ["“It’s”\tna\u00efve — yes  \n\nα is skipped\n\nkept"]
    assert python_corpora._paragraphs(texts) == ['"It\'s"  naive -- yes', "kept"]


def test_stdlib_is_code_that_parses_held_out_by_module():
    sizes = {split: sum(map(len, _read("stdlib", split))) for split in documents.SPLITS}
    assert sum(sizes.values()) > 8_000_000
    for split in ("valid", "test"):
        assert 0.02 < sizes[split] / sum(sizes.values()) < 0.08
        for text in _read("stdlib", split):
            ast.parse(text)
    places = {split: [document.place for document in python_corpora.read("stdlib").read(split)] for split in sizes}
    assert {"doctest.py", "xmlrpc/client.py", "xmlrpc/server.py"} <= set(places["valid"])
    modules = [{place.split("/")[0] for place in found} for found in places.values()]
    assert not modules[0] & modules[1] | modules[0] & modules[2] | modules[1] & modules[2]
    assert not {"test", "encodings", "pydoc_data", "site-packages"} & set().union(*modules)
    *_, last = python_corpora.read("stdlib").read("valid")
    assert last.done == 1


def test_others_do_not_exist():
    with pytest.raises(
        ValueError, match=r"the source 'python:tests' does not exist: give python:docs or python:stdlib"
    ):
        python_corpora.read("tests")
