"""Tests of corpora in files: documents are complete and in order, and errors name the file and the line."""

import glob
import gzip
import json
import lzma
import os
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from sedd_jax.data import documents, text_files
from sedd_jax.runtime import errors


def _texts(corpus, split):
    return [document.text for document in corpus.read(split)]


def _places(corpus, split):
    return [document.place.rpartition("/")[2] for document in corpus.read(split)]


def test_split_files_are_read_in_order_through_every_compression(tmp_path, monkeypatch):
    listed = glob.glob
    monkeypatch.setattr(glob, "glob", lambda *args, **kwargs: sorted(listed(*args, **kwargs), reverse=True))
    (tmp_path / "b.train.txt").write_bytes(b"\xef\xbb\xbffour\r\nfive\n")
    with gzip.open(tmp_path / "c.train.txt.gz", "wt", encoding="utf-8") as file:
        file.write("six é")
    with lzma.open(tmp_path / "a.train.txt.xz", "wt", encoding="utf-8") as file:
        file.write("one\n\ftwo\fthree\n\n\f \n")
    with zipfile.ZipFile(tmp_path / "d.train.txt.zip", "w") as archive:
        archive.writestr("text", "\n\nseven\n")
    for split in ("valid", "test"):
        (tmp_path / f"a.{split}.txt").write_text("held out")
    corpus = text_files.read_text(f"{tmp_path}/*.{{split}}.txt*")
    assert _texts(corpus, "train") == ["one", "two", "three", "four\nfive", "six é", "seven"]
    expected = ["a.train.txt.xz:1", "a.train.txt.xz:2", "a.train.txt.xz:2", "b.train.txt:1", "c.train.txt.gz:1"]
    assert _places(corpus, "train") == [*expected, "d.train.txt.zip:3"]
    done = [document.done for document in corpus.read("train")]
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] <= 1


@pytest.mark.parametrize("pattern", ["{split}.txt", "{split}*.txt"])
def test_held_out_text_has_the_names_that_people_give_it(tmp_path, pattern):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    corpus = text_files.read_text(f"{tmp_path}/{pattern}")
    assert {split: _texts(corpus, split) for split in corpus.splits} == {
        "train": ["train"],
        "valid": ["validation"],
        "test": ["test"],
    }


def test_position_splits_a_text_at_lines_and_loses_nothing(tmp_path):
    lines = [f"line {number} of the text" for number in range(1000)]
    (tmp_path / "1.txt").write_text("\n".join(lines[:600]))
    (tmp_path / "2.txt").write_text("\n".join(lines[600:]))
    corpus = text_files.read_text(f"{tmp_path}/*.txt")
    train, valid, test = ("\n".join(_texts(corpus, split)).split("\n") for split in documents.SPLITS)
    assert train + valid + test == lines
    assert len(valid) == pytest.approx(50, abs=2)
    assert len(test) == pytest.approx(50, abs=2)
    for split in documents.SPLITS:
        *_, last = corpus.read(split)
        assert last.done == pytest.approx(1, abs=0.05)


def test_a_text_of_one_line_is_cut_at_its_characters(tmp_path):
    (tmp_path / "text8").write_text("abcdefghij" * 20)
    corpus = text_files.read_text(f"{tmp_path}/text8")
    assert [len(_texts(corpus, split)[0]) for split in corpus.splits] == [180, 10, 10]
    assert "".join(_texts(corpus, split)[0] for split in corpus.splits) == "abcdefghij" * 20


def test_missing_held_out_files_are_cut_off_the_end_of_train(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": str(number)}) for number in range(100)))
    (tmp_path / "test.jsonl").write_text('{"text": "apart"}\n')
    corpus = text_files.read_jsonl(f"{tmp_path}/{{split}}.jsonl")
    assert _texts(corpus, "train") == [str(number) for number in range(95)]
    assert _texts(corpus, "valid") == [str(number) for number in range(95, 100)]
    assert _texts(corpus, "test") == ["apart"]
    (tmp_path / "train.jsonl").unlink()
    assert text_files.read_jsonl(f"{tmp_path}/{{split}}.jsonl").splits == ("test",)


def test_lines_are_documents_as_they_stand(tmp_path):
    (tmp_path / "test.txt").write_bytes(b" one \r\n\n two")
    corpus = text_files.read_lines(f"{tmp_path}/{{split}}.txt")
    assert _texts(corpus, "test") == [" one ", "", " two"]
    assert _places(corpus, "test") == ["test.txt:1", "test.txt:2", "test.txt:3"]


def test_json_lines_give_their_field_whole(tmp_path):
    long = "word " * 200_000
    records = [{"text": "a\nb\fc", "body": "one"}, {"body": "", "text": 1}, {"body": long}]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n\n  \n")
    corpus = text_files.read_jsonl(f"{path.parent}/{{split}}.jsonl#body")
    assert len([text for split in corpus.splits for text in _texts(corpus, split)]) == 3
    assert _texts(corpus, "train") == ["one", "", long]
    assert _places(corpus, "train") == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"test.jsonl:2 is not JSON \(Unterminated string.*correct or remove the line"),
        (b"[1, 2]", r"test.jsonl:2 has no field 'text': correct or remove the line"),
        (b'{"body": "b", "id": 1}', r"test.jsonl:2 has no field 'text', its fields are body, id: name .* as in #body$"),
        (b'{"text": 5}', r"test.jsonl:2, field 'text', holds int, not text"),
        (b"null", r"test.jsonl:2 has no field 'text': correct or remove the line"),
        (b'{"text": "a\\ud800"}', r"test.jsonl:2, field 'text', holds half a surrogate pair at character 1"),
        (b'{"text": "caf\xe9"}', r"test.jsonl:2 is not UTF-8: byte 0xe9 at byte 13 of the line"),
        (b"\x00" * 50, r"test.jsonl:2 holds U\+0000 at character 0: remove it"),
        (b'{"text": "a\\u0000"}', r"test.jsonl:2, field 'text', holds U\+0000 at character 1"),
        (b"[" * 100_000, r"test.jsonl:2 is not JSON"),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path, line, message):
    (tmp_path / "test.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        _texts(text_files.read_jsonl(f"{tmp_path}/{{split}}.jsonl"), "test")


def _write_parquet(path, texts):
    table = pyarrow.table({"body": texts, "number": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def test_parquet_gives_its_column_over_files_and_row_groups(tmp_path):
    _write_parquet(tmp_path / "a.parquet", [f"a{number}" for number in range(30)])
    _write_parquet(tmp_path / "b.parquet", [f"b{number}" for number in range(10)])
    corpus = text_files.read_parquet(f"{tmp_path}/*.parquet#body")
    expected = [f"a{number}" for number in range(30)] + [f"b{number}" for number in range(10)]
    assert [text for split in corpus.splits for text in _texts(corpus, split)] == expected
    assert _places(corpus, "valid") == ["b.parquet row 6", "b.parquet row 7"]
    assert [document.done for document in corpus.read("valid")] == pytest.approx([0.5, 1])


def test_wrong_parquet_is_named(tmp_path):
    _write_parquet(tmp_path / "a.parquet", ["one", "a\0"])
    with pytest.raises(ValueError, match=r"a.parquet row 1, column 'body', holds U\+0000 at character 1"):
        _texts(text_files.read_parquet(f"{tmp_path}/*.parquet#body"), "train")
    with pytest.raises(ValueError, match=r"a.parquet has no column 'text', its columns are body, number.*#body$"):
        _texts(text_files.read_parquet(f"{tmp_path}/*.parquet"), "train")
    with pytest.raises(ValueError, match=r"row 0, column 'number', holds int"):
        _texts(text_files.read_parquet(f"{tmp_path}/*.parquet#number"), "train")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a.parquet is not a Parquet file"):
        _texts(text_files.read_parquet(f"{tmp_path}/*.parquet#body"), "train")


def test_a_null_is_an_empty_document_in_every_source(tmp_path):
    """One null among millions of rows is nothing that anybody corrects. It is left out and counted where it is read."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), tmp_path / "test.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [None, None]}), tmp_path / "valid.parquet")
    (tmp_path / "test.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    for read, suffix in ((text_files.read_parquet, "parquet"), (text_files.read_jsonl, "jsonl")):
        corpus = read(f"{tmp_path}/{{split}}.{suffix}")
        assert _texts(corpus, "test") == ["one", "", "two"]
    assert _texts(text_files.read_parquet(f"{tmp_path}/{{split}}.parquet"), "valid") == ["", ""]


def test_text_errors_name_the_file_and_the_remedy(tmp_path):
    with pytest.raises(errors.UserError, match=r"no file matches '.*none\*'"):
        text_files.read_text(f"{tmp_path}/none*")
    wrong = {
        "latin.txt": (b"good\ncaf\xe9 noir", r"latin.txt:2 is not UTF-8: byte 0xe9 at byte 3 of the line"),
        "cut.txt.xz": (lzma.compress(b"text" * 1000)[:-20], r"cut.txt.xz cannot be decompressed"),
        "plain.txt.gz": (b"text", r"plain.txt.gz cannot be decompressed"),
        "plain.txt.zip": (b"text", r"plain.txt.zip cannot be decompressed"),
    }
    for name, (content, message) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            _texts(text_files.read_text(f"{tmp_path}/{name}"), "train")


@pytest.mark.parametrize("content", ['[\n{"text": "a"}\n]', '[{"text": "a"}]', '{\n"text": "a"\n}'])
def test_json_that_is_not_lines_is_told_how_to_become_lines(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(
        errors.UserError, match=r"a.json is JSON, but .*, not an object on each line: jq -c .* > a.jsonl"
    ):
        _texts(text_files.read_jsonl(f"{tmp_path}/a.json"), "train")
    (tmp_path / "a.json").rename(tmp_path / "my a.json")
    with pytest.raises(errors.UserError, match=r": jq -c \S+ '/.*/my a.json' > 'my a'.jsonl"):
        _texts(text_files.read_jsonl(f"{tmp_path}/my a.json"), "train")


def test_a_name_that_exists_is_no_pattern(tmp_path):
    (tmp_path / "c#").mkdir()
    for name in ("Novels [1851].txt", "c#/a#b.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}\n' * 30)
    assert _texts(text_files.read_text(f"{tmp_path}/Novels [1851].txt"), "train")
    for pattern in ("c#/a#b.jsonl#text", "c#/*.jsonl", "c#/*.jsonl#"):
        assert "one" in _texts(text_files.read_jsonl(f"{tmp_path}/{pattern}"), "train")


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one\n" * 30)
    assert _texts(text_files.read_text("~/a.txt"), "train")
    assert _texts(text_files.read_text("~/*.txt"), "train")


def test_nothing_that_was_asked_for_is_left_out_in_silence(tmp_path, monkeypatch):
    """Held-out text behind a link that leads nowhere would otherwise be cut off the training text."""
    (tmp_path / "train.txt").write_text("one\n" * 30)
    (tmp_path / "valid.txt").symlink_to(tmp_path / "gone.txt")
    for pattern in ("{split}.txt", "{split}*.txt", "v*.txt"):
        with pytest.raises(errors.UserError, match=r"valid.txt is a link to .*gone.txt, which does not exist: mend or"):
            text_files.read_text(f"{tmp_path}/{pattern}")
    with pytest.raises(
        errors.UserError, match=rf"{tmp_path}/ is a directory: name the files in it, as in {tmp_path}/\*"
    ):
        text_files.read_text(f"{tmp_path}/")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(errors.UserError, match="pipe is not a regular file, and text is read twice"):
        text_files.read_text(f"{tmp_path}/pipe")
    (tmp_path / "closed" / "inner").mkdir(parents=True)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and allowed(path, mode))
    for pattern in ("*/*/*.txt", "**/*.txt"):
        with pytest.raises(errors.UserError, match="closed may not be listed, and files in it may match"):
            text_files.read_text(f"{tmp_path}/{pattern}")


def test_each_file_is_read_once_whatever_links_lead_to_it(tmp_path, monkeypatch):
    """Two links to the folder that they are in have 2**40 paths before the system refuses the next one."""
    for name in ("d/x.txt", "d/m/y.txt", "d/.hidden/z.txt", "outside/w.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    links = {"l1": ".", "l2": ".", "m/up": "../..", "k": "../outside", "a": "m", "itself": "itself", "b.txt": "x.txt"}
    for name, target in links.items():
        (tmp_path / "d" / name).symlink_to(target)
    found = ["d/k/w.txt", "d/m/y.txt", "d/x.txt"]
    for pattern in ("d/**/*.txt", "d/**/**/*.txt", "./d/**/*.txt", f"{tmp_path}/d/**/*.txt"):
        paths = text_files._matching(pattern, "")
        assert [os.path.relpath(path) for path in paths] == [os.path.normpath(path) for path in found], pattern
    assert text_files._matching("d/**/l1/**/y.txt", "") == ["d/l1/m/y.txt"]
    assert text_files._matching("d/*/*.txt", "") == ["d/a/y.txt", "d/k/w.txt", "d/l1/x.txt"]
    assert text_files._matching("d/*.txt", "") == ["d/x.txt"]
    monkeypatch.chdir(tmp_path / "d")
    assert text_files._matching("**/*.txt", "") == ["k/w.txt", "m/y.txt", "x.txt"]
    assert text_files._matching("m/**", "") == ["m/y.txt"]


def test_a_folder_below_any_others_has_the_names_that_glob_finds(tmp_path):
    for name in ("1.txt", "a/1.txt", "a/b/2.txt", "a/b/c/1.txt", "[x]/*/1.txt", "a/.b/1.txt", "n.txt/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    for pattern in (
        "**",
        "**/1.txt",
        "**/b/**/*.txt",
        "a/**",
        "a/**/?/*",
        "a**/*",
        "**/**",
        "[[]x]/**/*",
        "*/**/1.txt",
    ):
        listed = {path for path in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if os.path.isfile(path)}
        assert text_files._matching(f"{tmp_path}/{pattern}", "") == sorted(listed), pattern


def test_a_file_whose_size_is_not_known_is_read(tmp_path, monkeypatch):
    """Files of the system in /proc say that they hold 0 bytes; a log may grow while it is read."""
    (tmp_path / "a.txt").write_text("one\n\ftwo\n")
    for size in (0, 1):
        monkeypatch.setattr(os.path, "getsize", lambda path, size=size: size)
        found = list(text_files.lines([f"{tmp_path}/a.txt"]))
        assert [line.text for line in found] == ["one\n", "\f", "two\n"]
        assert [line.done for line in found] == [1, 1, 1]


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="Linux lists its processors there")
def test_files_of_the_system_are_text():
    assert "processor" in _texts(text_files.read_text("/proc/cpuinfo"), "train")[0]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_that_does_not_fit_in_memory_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_files.hosts, "memory_bytes", lambda: 1600)
    path = tmp_path / name
    write = gzip.open if name.endswith("gz") else open
    fits = "a" * 99 + "\n"
    with write(path, "wt") as file:
        file.write(f"{fits[1:]}\f" * 30)
    assert _texts(text_files.read_text(str(path)), "train")
    assert _texts(text_files.read_lines(str(path)), "train")
    with write(path, "wt") as file:
        file.write(f"{fits}\f{fits}")
    for read in (text_files.read_text, text_files.read_lines, text_files.read_jsonl):
        with pytest.raises(errors.UserError, match=rf"{name}:2 is a line of over 100 bytes, .*: cut it, .* fold -s"):
            _texts(read(str(path)), "train")
    with write(path, "wt") as file:
        file.write(fits * 30)
    assert _texts(text_files.read_lines(str(path)), "train")
    with pytest.raises(errors.UserError, match=rf"{name}:1 begins a document of over 100 .*: end it by a form feed"):
        _texts(text_files.read_text(str(path)), "train")


def test_blank_files_hold_no_document(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\f\n")
    (tmp_path / "none.txt").write_text("")
    corpus = text_files.read_text(f"{tmp_path}/*.txt")
    assert [_texts(corpus, split) for split in corpus.splits] == [[], [], []]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zip", "a.parquet", "plain.parquet"])
def test_bytes_that_changed_are_read_or_named(tmp_path, name):
    """Files with random cuts, changes and insertions are read, or the error names the file."""
    texts = [f"line {number} é" for number in range(300)]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    path = tmp_path / name
    if path.suffix == ".parquet":
        compression = "none" if name.startswith("plain") else "snappy"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=70, compression=compression)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", lines)
    else:
        with {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "wb") as file:
            file.write(lines)
    read = text_files.read_parquet if path.suffix == ".parquet" else text_files.read_jsonl
    whole, random = path.read_bytes(), np.random.default_rng(0)
    messages = []
    for _ in range(60):
        content = bytearray(whole)
        for place in random.integers(0, len(whole), random.integers(1, 4)).tolist():
            kind = random.integers(0, 4)
            if kind == 0:
                del content[max(1, place) :]
            elif kind == 1:
                content[place:place] = random.bytes(5)
            elif place < len(content):
                content[place] = random.integers(0, 256)
        path.write_bytes(content)
        try:
            corpus = read(str(path))
            assert all(isinstance(text, str) for split in corpus.splits for text in _texts(corpus, split))
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(name in message for message in messages)
