"""Tests of sources: each opens the right corpus, or the error says what is wrong."""

import http.client
import io
import json
import urllib.error
import urllib.request
import zipfile

import pytest

from sedd_jax.data import corpora, hub_corpora, published_corpora
from sedd_jax.runtime import errors


def _texts(source, split):
    return [document.text for document in corpora.find(source).read(split)]


def test_every_kind_of_file_is_found(tmp_path):
    (tmp_path / "test.txt").write_text("one\ftwo")
    (tmp_path / "test.jsonl").write_text('{"text": "three"}')
    assert _texts(f"text:{tmp_path}/{{split}}.txt", "test") == ["one", "two"]
    assert _texts(f"lines:{tmp_path}/{{split}}.txt", "test") == ["one", "two"]
    assert _texts(f"jsonl:{tmp_path}/{{split}}.jsonl", "test") == ["three"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pyhton:docs", r"'pyhton:docs'.*did you mean 'python'\?.*text:GLOB.*lambada"),
        ("wikitex2", r"'wikitex2'.*did you mean 'wikitext2'\?"),
        ("python:tests", "'python:tests' does not exist"),
        ("hf:lm1b", r"hf:lm1b names no owner: give one as in hf:OWNER/NAME"),
    ],
)
def test_unknown_sources_name_the_known(source, message):
    with pytest.raises(ValueError, match=message):
        corpora.find(source)


def test_test_sets_keep_every_row_and_detokenize_it(tmp_path):
    (tmp_path / "wiki.test.tokens").write_text(" \n = Title = \n \n It 's here , N km . \n")
    found = corpora.find(f"wikitext103:lines:{tmp_path}/wiki.{{split}}.tokens")
    assert found.keeps_empty
    assert found.splits == ("test",)
    rows = [document.text for document in found.read("test")]
    assert rows == ["", " = Title =\n", "", " It's here, 1 km.\n"]
    (tmp_path / "test.txt").write_text(" the <unk> says N \n it 's\n")
    assert _texts(f"ptb:lines:{tmp_path}/{{split}}.txt", "test") == ["the ? says N", "it's"]
    assert _texts(f"lm1b:lines:{tmp_path}/{{split}}.txt", "test") == ["the <unk> says N", "it's"]
    (tmp_path / "lambada.test.jsonl").write_text(json.dumps({"text": "“ so ” it\nis "}))
    assert _texts(f"lambada:jsonl:{tmp_path}/lambada.{{split}}.jsonl", "test") == ['\n" so " it\nis']


def test_training_corpora_are_read_as_they_are(tmp_path):
    (tmp_path / "text8").write_text("ab " * 100)
    assert [len(_texts(f"text8:text:{tmp_path}/text8", split)[0]) for split in ("train", "valid", "test")] == [
        270,
        15,
        15,
    ]
    (tmp_path / "owt.jsonl").write_text("\n".join(json.dumps({"text": f"a , b {number}"}) for number in range(20)))
    found = corpora.find(f"openwebtext:jsonl:{tmp_path}/owt.jsonl")
    assert not found.keeps_empty
    assert next(found.read("train")).text == "a , b 0"


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("text8", {"text8.zip"}),
        ("ptb", {"ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"}),
        ("lambada", {"lambada_test.jsonl"}),
    ],
)
def test_what_the_network_has_is_fetched_once_and_whole(tmp_path, monkeypatch, name, files):
    """Local files stand in for the addresses. Whether the real addresses still hold the corpora is not tested."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()
    asked = []

    urlopen = urllib.request.urlopen

    def answer(address, timeout):
        asked.append(address)
        return urlopen((served / address.rpartition("/")[2]).as_uri(), timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(errors.UserError, match=rf"cannot be fetched .*your own copy as {name}:SOURCE"):
        corpora.find(name)
    content = {"text8.zip": _zipped("ab" * 100), "lambada_test.jsonl": b'{"text": "row"}'}
    for file in files:
        (served / file).write_bytes(content.get(file, f"row of {file}\n".encode()))
    assert _texts(name, "test")
    assert {address.rpartition("/")[2] for address in asked} == files
    times = len(asked)
    corpora.find(name)
    assert len(asked) == times
    assert not list((tmp_path / "cache").rglob("*.partial"))


def _zipped(text):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("text8", text)
    return content.getvalue()


def test_a_fetch_that_breaks_off_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    class Broken:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, _):
            raise urllib.error.URLError("reset")

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Broken())
    with pytest.raises(errors.UserError, match=r"http://here/a.zip cannot be fetched .*reset"):
        published_corpora._fetch("http://here/a.zip", tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()

    class Short(io.BytesIO):
        """A connection that closes early, which `read` does not report."""

        def __init__(self):
            super().__init__(b"a" * 10)
            self.headers = {"Content-Length": "1000"}

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Short())
    with pytest.raises(
        errors.UserError, match=r"http://here/a.zip cannot be fetched \(it ended after 10 of 1000 bytes\)"
    ):
        published_corpora._fetch("http://here/a.zip", tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()


def test_two_fetches_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """The second begins and ends while the first one reads."""
    path, content, others = tmp_path / "a.txt", b"a" * 1000, [1]

    class Slow(io.BytesIO):
        def __init__(self):
            super().__init__(content)
            self.headers = {"Content-Length": str(len(content))}

        def read(self, _):
            if self.tell() == 500 and others:
                others.clear()
                published_corpora._fetch("http://here/a.txt", path)
                assert path.read_bytes() == content
            return super().read(100)

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Slow())
    published_corpora._fetch("http://here/a.txt", path)
    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(http.client.BadStatusLine("SSH-2.0\r\n"), "SSH-2.0"), (http.client.IncompleteRead(b""), "IncompleteRead")],
)
def test_what_is_no_server_of_files_is_named(tmp_path, monkeypatch, error, said):
    def answer(*_, **__):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(errors.UserError, match=rf"http://here/a.txt cannot be fetched \({said}.*your own copy as"):
        published_corpora._fetch("http://here/a.txt", tmp_path / "a.txt")
    assert not hub_corpora._answers("http://here")
