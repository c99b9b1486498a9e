"""Text comes whole, in order, and held-out text stays unseen."""

import glob
import gzip
import lzma
import subprocess
import sys

import pytest

from sedd_jax import corpora


def _read(source, split):
    return list(corpora.read(source, split))


def _paragraphs(split):
    return {" ".join(part.split()) for document in _read("python:docs", split) for part in document.split("\n\n")}


def test_python_docs_hold_out_about_a_twentieth_each():
    sizes = {split: sum(map(len, _read("python:docs", split))) for split in corpora.SPLITS}
    assert sum(sizes.values()) > 1_500_000
    for split in ("valid", "test"):
        assert 0.03 < sizes[split] / sum(sizes.values()) < 0.09


def test_python_docs_share_no_paragraph_between_splits():
    train, valid, test = map(_paragraphs, corpora.SPLITS)
    assert not train & valid
    assert not (train | valid) & test


def test_python_docs_keep_a_small_alphabet():
    text = "".join("".join(_read("python:docs", split)) for split in corpora.SPLITS)
    assert set(text) == {chr(code) for code in range(32, 127)} | {"\n"}
    assert " \n" not in text


def test_python_docs_are_the_same_in_another_process():
    command = (
        "import hashlib; from sedd_jax import corpora; "
        "print(hashlib.sha256('|'.join(corpora.read('python:docs', 'valid')).encode()).hexdigest())"
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
    assert corpora._docstrings(module) == ["Top.", "Of A."]
    module.write_text("print 'two'\n")
    assert corpora._docstrings(module) == []


def test_paragraphs_spell_out_typography_and_skip_other_alphabets():
    texts = ["“It’s”\tna\u00efve — yes  \n\nα is skipped\n\nkept"]
    assert corpora._paragraphs(texts) == ['"It\'s"  naive -- yes', "kept"]


def test_split_files_are_read_in_order_through_every_compression(tmp_path, monkeypatch):
    listed = glob.glob
    monkeypatch.setattr(glob, "glob", lambda *args, **kwargs: sorted(listed(*args, **kwargs), reverse=True))
    (tmp_path / "b.train.txt").write_bytes(b"\xef\xbb\xbffour\r\nfive\n")
    with gzip.open(tmp_path / "c.train.txt.gz", "wt", encoding="utf-8") as file:
        file.write("six é")
    with lzma.open(tmp_path / "a.train.txt.xz", "wt", encoding="utf-8") as file:
        file.write("one\n\ftwo\fthree\n\n\f \n")
    assert _read(f"text:{tmp_path}/*.{{split}}.txt*", "train") == ["one", "two", "three", "four\nfive", "six é"]


def test_position_splits_a_text_at_lines_and_loses_nothing(tmp_path):
    lines = [f"line {number} of the text" for number in range(1000)]
    (tmp_path / "1.txt").write_text("\n".join(lines[:600]))
    (tmp_path / "2.txt").write_text("\n".join(lines[600:]))
    train, valid, test = ("\n".join(_read(f"text:{tmp_path}/*.txt", split)).split("\n") for split in corpora.SPLITS)
    assert train + valid + test == lines
    assert len(valid) == pytest.approx(50, abs=2)
    assert len(test) == pytest.approx(50, abs=2)


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("pyhton:docs", "train", r"'pyhton:docs'.*did you mean 'python'\?.*text:GLOB"),
        ("python:tests", "train", "'python:tests' does not exist.*python:docs"),
        ("python:docs", "dev", "split='dev' does not exist.*train, valid, test"),
    ],
)
def test_unknown_sources_name_the_known(source, split, message):
    with pytest.raises(ValueError, match=message):
        _read(source, split)


def test_text_errors_name_the_file_and_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*none\*'"):
        _read(f"text:{tmp_path}/none*", "train")
    (tmp_path / "empty.txt").write_text(" \n\f\n")
    with pytest.raises(ValueError, match="hold no text"):
        _read(f"text:{tmp_path}/empty.txt", "train")
    (tmp_path / "line.txt").write_text("one line has no place for a cut")
    with pytest.raises(ValueError, match=r"the train split of source=.* holds no text"):
        _read(f"text:{tmp_path}/line.txt", "train")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 3"):
        _read(f"text:{tmp_path}/latin.txt", "train")
    (tmp_path / "cut.txt.xz").write_bytes(lzma.compress(b"text" * 1000)[:-20])
    with pytest.raises(ValueError, match=r"cut.txt.xz cannot be decompressed"):
        _read(f"text:{tmp_path}/cut.txt.xz", "train")
    (tmp_path / "plain.txt.gz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"plain.txt.gz cannot be decompressed"):
        _read(f"text:{tmp_path}/plain.txt.gz", "train")
