"""Tests of datasets from tensorflow-datasets and the Hugging Face hub, with and without a network."""

import ast
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from sedd_jax.data import hub_corpora
from sedd_jax.runtime import errors

ROWS = {"train": [f"train {number} é" for number in range(40)], "valid": ["one", "two"]}
# Settings that send requests to an address where nothing answers.
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HF_ENDPOINT"), "http://127.0.0.1:9")
PREAMBLE = """
import sys
from absl import logging
from sedd_jax.data import corpora
logging.set_verbosity(logging.FATAL)
"""


def _run(directory, code):
    """Lines that a new process prints. It must be new, because both libraries read their settings when imported."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        env=os.environ | NOWHERE | {"TFDS_DATA_DIR": str(directory), "HF_HOME": str(directory)},
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [ast.literal_eval(line.removeprefix("=")) for line in done.stdout.splitlines() if line.startswith("=")]


def _read(source):
    return (
        f"found = corpora.find({source!r})\n"
        "for split in found.splits: print('=', [tuple(document) for document in found.read(split)], sep='')\n"
    )


def _failure(source):
    return (
        f"try: corpora.find({source!r})\nexcept (ValueError, OSError) as error: print('=', repr(str(error)), sep='')\n"
    )


def test_the_builder_of_local_text_is_prepared_and_read_without_tensorflow(tmp_path):
    manual = tmp_path / "downloads" / "manual" / "text_files"
    manual.mkdir(parents=True)
    for split, rows in ROWS.items():
        (manual / f"{split}.txt").write_text("\f".join(rows))
    code = _read("tfds:text_files") + "print('=', 'tensorflow' in sys.modules)\n" + _failure("tfds:text_files#passage")
    train, valid, test, imports_tensorflow, wrong = _run(tmp_path, code)
    assert [text for text, _, _ in train] == ROWS["train"][:38]
    assert [text for text, _, _ in valid] == ROWS["valid"]
    assert [text for text, _, _ in test] == ROWS["train"][38:]
    assert [rest for _, *rest in test] == [["tfds:text_files/1.0.0 test 0", 0.5], ["tfds:text_files/1.0.0 test 1", 1]]
    assert imports_tensorflow is False
    assert wrong == "tfds:text_files#passage has no text in 'passage': name one of text, as in #text"
    assert list((tmp_path / "text_files" / "1.0.0").glob("*.array_record*"))
    manual.rename(tmp_path / "away")
    assert _run(tmp_path, _read("tfds:text_files")) == [train, valid, test]


def test_tensorflow_datasets_say_at_once_what_is_missing(tmp_path):
    names = ("tfds:lm1b", "tfds:pg19", "tfds:tiny_shakespeare", "tfds:wiki40b", "tfds:text_files")
    *unreached, unknown, manual = _run(tmp_path, "".join(map(_failure, names)))
    for message, name in zip(unreached, ("lm1b", "pg19", "tiny_shakespeare"), strict=True):
        assert message.startswith(f"tfds:{name} is not in {tmp_path}/{name}, and http")
        assert "does not answer: connect to the network" in message
    assert unknown.startswith("tfds:wiki40b is not registered without TensorFlow (Dataset wiki40b not found.)")
    assert manual.startswith("tfds:text_files cannot be prepared: ")
    assert "Put train.txt" in manual


def test_hugging_face_datasets_give_their_column(tmp_path):
    directory = tmp_path / "owner" / "name"
    directory.mkdir(parents=True)
    for split, name in (("train", "train"), ("valid", "validation")):
        table = pyarrow.table({"body": ROWS[split], "number": list(range(len(ROWS[split])))})
        pyarrow.parquet.write_table(table, directory / f"{name}-00000-of-00001.parquet")
    code = _read("hf:owner/name#body") + _read("hf:owner/name") + _failure("hf:owner/name#number")
    train, valid, test, *same, wrong = _run(tmp_path, code)
    assert [text for text, _, _ in train] == ROWS["train"][:38]
    assert [text for text, _, _ in valid] == ROWS["valid"]
    assert [text for text, _, _ in test] == ROWS["train"][38:]
    assert [rest for _, *rest in test] == [["hf:owner/name train 38", 0.5], ["hf:owner/name train 39", 1]]
    assert same == [train, valid, test]
    assert wrong == "hf:owner/name#number has no text in 'number': name one of body, as in #body"
    with pytest.raises(ValueError, match="tfds:mnist has no column of text"):
        hub_corpora._column("tfds:mnist", "", [])


@pytest.mark.parametrize("names", [("valid", "validation", "dev"), ("dev", "validation", "valid")])
def test_of_two_names_of_a_split_the_order_does_not_decide(names):
    sources = {"train": ["text"] * 40, **{name: [name] for name in names}}
    corpus = hub_corpora._corpus("hf:x/y", sources, lambda rows, indices: [rows[index] for index in indices])
    assert [text for text, _, _ in corpus.read("valid")] == ["valid"]


@pytest.mark.parametrize(
    ("second", "why"), [('{"text": "tw', "JSON parse error"), ('{"body": "two", "number": 1}\n', "column names")]
)
def test_torn_and_uneven_files_are_one_line(tmp_path, monkeypatch, second, why):
    pytest.importorskip("datasets", reason="needs pip install 'sedd_jax[hf]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train-0.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "owner" / "name" / "train-1.jsonl").write_text(second)
    with pytest.raises(errors.UserError, match=f"hf:owner/name cannot be loaded .*{why}") as raised:
        hub_corpora.read_hf("owner/name")
    assert "An error occurred while generating the dataset (" not in str(raised.value)


@pytest.mark.parametrize("address", ["nonsense", "http://[", "https://two words"])
def test_an_address_of_the_hub_that_is_none_is_named(monkeypatch, address):
    pytest.importorskip("datasets", reason="hf: needs the extra 'hf'")
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(errors.UserError, match=r"the environment has HF_ENDPOINT=.*, which is no address .*: set it"):
        hub_corpora.read_hf("an/owner")


def test_hugging_face_datasets_say_at_once_what_is_missing(tmp_path):
    # A judge of transformers may have imported the packages before.
    code = "import datasets\n" + _failure("hf:Salesforce/wikitext/wikitext-2-raw-v1") + _failure("hf:lm1b")
    wikitext, script = _run(tmp_path, code)
    assert wikitext.startswith("hf:Salesforce/wikitext/wikitext-2-raw-v1 cannot be loaded (")
    assert "OfflineModeIsEnabled" in wikitext  # so it did not try again and again
    assert "check the name and the network" in wikitext
    assert script == "hf:lm1b names no owner: give one as in hf:OWNER/NAME"
