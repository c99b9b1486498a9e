"""Tests of `sedd prepare`: it leaves finished text or none, describes it, and a run notices when it changes."""

import base64
import concurrent.futures
import contextlib
import json
import lzma
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiktoken
import tiktoken.load

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.data import detokenizers, documents, encoders, prepare, shards, tokenizers
from sedd_jax.runtime import errors, leases, storage
from tests.support import gcs_emulator, places, slow

SHARED = places.SHARED


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "text"
    directory.mkdir()
    for split, size in (("train", 2000), ("valid", 400), ("test", 400)):
        letters = np.random.default_rng(size).choice(list("abcdefgh "), size=size)
        (directory / f"{split}.txt").write_text("\f".join("".join(part) for part in np.split(letters, 10)))
    return f"text:{directory}/{{split}}.txt"


def _sedd(*arguments, **settings):
    command = [sys.executable, "-m", "sedd_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, timeout=300)


def test_a_corpus_is_prepared_and_described(tmp_path, source, capsys):
    out = tmp_path / "deep" / "prepared"
    assert cli.main(["prepare", f"--data={source}", "--tokenizer=characters", f"--out={out}", "--json"]) == 0
    printed = capsys.readouterr().out
    description = json.loads(printed.splitlines()[-1])
    assert description["source"] == source
    assert (description["tokenizer"], description["num_ids"], description["dtype"]) == ("characters", 9, "<u2")
    train = description["splits"]["train"]
    assert (train["num_documents"], train["num_tokens"], train["num_shards"]) == (10, 2000 + 9, 1)
    assert 2.9 < train["bigram_entropy_bits"] < train["unigram_entropy_bits"] < math.log2(9)
    assert description["sample"] == (tmp_path / "text" / "train.txt").read_text()[:200]
    assert "9 ids of 16 bits" in printed
    assert cli.main(["prepare", f"--describe={out}"]) == 0
    again = capsys.readouterr().out
    assert again == "".join(f"{line}\n" for line in printed.splitlines()[:-1])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--data=text:a", "--tokenizer=gpt2"], 2, "--out must be given"),
        (["--describe=a", "--tokenizer=bytes", "--out=a"], 2, "--describe goes without --data and --out"),
        (["--describe=a", "--data=text:a"], 2, "--describe goes without --data"),
        (["--describe=nowhere"], 1, "nowhere holds no finished header.json"),
        (["--data=text:none*", "--tokenizer=bytes", "--out=out"], 1, "no file matches 'none*'"),
        (["--data=text:full/a.txt", "--tokenizer=byts", "--out=out"], 1, "did you mean 'bytes'?"),
        (
            ["--data=text:full/a.txt", "--tokenizer=bytes", "--out=full"],
            1,
            "--out=full exists and is not empty: choose another",
        ),
        (
            ["--data=text:full/a.txt", "--tokenizer=bytes", "--out=full/a.txt"],
            1,
            "--out=full/a.txt exists and is not empty",
        ),
        (["--data=text:full/a.txt", "--tokenizer=bytes", "--out=full/a.txt/b"], 1, "cannot write to full/a.txt/b"),
        (
            ["--data=text:full/a.txt", "--tokenizer=bytes", "--out=out", "--num_workers=0"],
            1,
            "--num_workers=0 must be at least 1",
        ),
        (["--data=text:full/a.txt", "--tokenizer=text8", "--out=out"], 1, "full/a.txt:1: 'T' (U+0054) at position 0"),
    ],
)
def test_wrong_arguments_get_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("full").mkdir()
    pathlib.Path("full/a.txt").write_text("Text\n" * 100)
    assert cli.main(["prepare", *arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("sedd prepare: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(str(path) for path in pathlib.Path(".").rglob("*")) == ["full", "full/a.txt"]


def test_finished_text_is_never_written_again(tmp_path, source, capsys):
    arguments = [
        "prepare",
        f"--data={source}",
        "--tokenizer=characters",
        f"--out={tmp_path / 'out'}",
        "--num_workers=1",
    ]
    assert cli.main(arguments) == 0
    before = (tmp_path / "out" / "header.json").stat()
    assert cli.main(arguments) == 1
    assert "already holds prepared text: use it" in capsys.readouterr().err
    assert (tmp_path / "out" / "header.json").stat() == before


def test_text_that_was_finished_while_this_process_waited_is_never_written_again(tmp_path, source, monkeypatch):
    """Of two processes that begin at once, the later owner finds what the other one has finished."""
    out, owned = tmp_path / "out", leases.owned

    @contextlib.contextmanager
    def owned_later(directory, field):
        monkeypatch.setattr(leases, "owned", owned)
        prepare.prepare(source, "characters", out, num_workers=1)
        with owned(directory, field):
            yield

    monkeypatch.setattr(leases, "owned", owned_later)
    with pytest.raises(errors.UserError, match="already holds prepared text: use it"):
        prepare.prepare(source, "bytes", out, num_workers=1)
    assert shards.read_header(out)["tokenizer_spec"] == "characters"


@pytest.mark.slow
@pytest.mark.parametrize("told", slow.all_but([signal.SIGKILL], [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
def test_what_is_interrupted_does_not_look_finished_and_begins_again(tmp_path, told):
    (tmp_path / "train.txt").write_text("\f".join("some words to be cut " * 200 for _ in range(5000)))
    out = tmp_path / "out"
    arguments = ["prepare", f"--data=text:{tmp_path}/train.txt", "--tokenizer=bytes", f"--out={out}", "--num_workers=2"]
    # If these tests run in the background, SIGINT is ignored, and child processes would inherit that.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from sedd_jax.cli import main as cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in partial.glob("train-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = _children(child.pid)
    assert len(workers) >= 2
    child.send_signal(told)
    _, error = child.communicate(timeout=60)
    assert child.returncode in (-told, 130)
    if told is signal.SIGINT:
        assert error == "sedd prepare: interrupted\n"
    assert not out.exists()
    while any(pathlib.Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [worker for worker in workers if pathlib.Path(f"/proc/{worker}").exists()]
    (tmp_path / "train.txt").write_text("short\n" * 100)
    assert _sedd(*arguments).returncode == 0
    assert not partial.exists()
    assert len(shards.open_split(out, "train")[1]) == 539


def _children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return found + [grandchild for child in found for grandchild in _children(child)]


def test_text_is_prepared_into_a_bucket(tmp_path, source, monkeypatch):
    with gcs_emulator.Server("bucket") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        place = storage.directory("gs://bucket/data/letters")
        prepare.prepare(source, "characters", place, num_workers=1)
        assert list(server.blobs)[-1] == "data/letters/header.json"
        assert not storage.local_copy(place).exists()
        assert prepare.describe(place)["splits"]["test"]["num_tokens"] == 409
        with pytest.raises(errors.UserError, match="out=gs://bucket/data/letters already holds prepared text"):
            prepare.prepare(source, "characters", place, num_workers=1)
        place = storage.directory("gs://bucket/data/ranks")
        prepare.prepare(source, f"gpt2:{_ranks(tmp_path / 'ranks')}", place, num_workers=1)
        assert not storage.local_copy(place).exists()
        (tmp_path / "ranks").unlink()
        runs.start(tmp_path / "run", _config(f"prepared:{place}", f"gpt2:{tmp_path}/ranks"))
        assert runs.load(tmp_path / "run").split("train").num_tokens == 2010


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="WikiText and GPT-2's ranks lie in ../shared, which is absent")
def test_a_zero_shot_set_is_every_row_with_an_end_of_text(tmp_path, capsys):
    source = f"wikitext2:lines:{SHARED}/corpus/wikitext2/{{split}}.txt.xz"
    tokenizer = f"gpt2:{SHARED}/tokenizers/gpt2.tiktoken"
    arguments = [f"--data={source}", f"--tokenizer={tokenizer}", f"--out={tmp_path / 'out'}", "--num_workers=2"]
    assert cli.main(["prepare", *arguments]) == 0
    with lzma.open(SHARED / "corpus" / "wikitext2" / "test.txt.xz", "rt", encoding="utf-8", newline="\n") as file:
        rows = [row if row.strip() else "" for row in file]
    assert len(rows) == 4358  # as the published set has
    gpt2 = tiktoken.Encoding(
        name="gpt2",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        mergeable_ranks=tiktoken.load.load_tiktoken_bpe(f"{SHARED}/tokenizers/gpt2.tiktoken"),
        special_tokens={},
    )
    expected = [[*gpt2.encode_ordinary(detokenizers.wikitext(row)), 50256] for row in rows]
    counts, tokens = shards.open_split(tmp_path / "out", "test")
    assert counts["num_documents"] == 4358
    assert tokens.read(0, len(tokens)).tolist() == [id_ for row in expected for id_ in row]


def test_training_corpora_become_what_the_paper_trains_on(tmp_path):
    """Small files in the format of each corpus stand in for the corpora, which cannot be downloaded here."""
    (tmp_path / "text8").write_text("one two three " * 100)
    prepare.prepare(f"text8:text:{tmp_path}/text8", "text8", tmp_path / "a", num_workers=1)
    sizes = {split: counts["num_tokens"] for split, counts in shards.read_header(tmp_path / "a")["splits"].items()}
    assert sizes == {"train": 1260, "valid": 70, "test": 70}
    (tmp_path / "owt.jsonl").write_text("".join(json.dumps({"text": f"page {number}"}) + "\n" for number in range(20)))
    ranks = tmp_path / "bytes.tiktoken"
    ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)))
    prepare.prepare(f"openwebtext:jsonl:{tmp_path}/owt.jsonl", f"gpt2:{ranks}", tmp_path / "b", num_workers=1)
    _, tokens = shards.open_split(tmp_path / "b", "train")
    assert bytes(tokens.read(0, 14).clip(0, 255).astype(np.uint8)) == b"page 0\xffpage 1\xff"
    assert shards.read_header(tmp_path / "b")["splits"]["train"]["num_documents"] == 18
    for split in ("train", "test"):
        (tmp_path / f"{split}.en").write_text('The cat , it \'s " here " .\n' * 40)
    (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\n[MASK]\nthe\ncat\n,\nit\n'\ns\n\"\nhere\n.\n")
    pytest.importorskip("tokenizers", reason="word pieces need pip install tokenizers")
    source = f"lm1b:lines:{tmp_path}/{{split}}.en"
    prepare.prepare(source, f"wordpiece:{tmp_path / 'vocab.txt'}", tmp_path / "c", num_workers=1)
    counts, tokens = shards.open_split(tmp_path / "c", "test")
    assert tokens.read(0, 12).tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 9, 11, 1, 3]
    assert counts["num_unknown"] == 0


def _config(source, tokenizer):
    fields = {"data.source": source, "data.tokenizer": tokenizer, "data.length": 16}
    fields |= {"network.hidden_size": 32, "network.num_heads": 2, "network.num_layers": 1}
    merged = configs.default()
    merged.update_from_flattened_dict(fields)
    return configs.parse(merged)


def test_a_run_reads_prepared_text_where_it_lies_as_if_it_had_packed_it(tmp_path, source):
    prepare.prepare(source, "characters", tmp_path / "prepared", num_workers=1)
    opened = []
    for name, text in (("linked", f"prepared:{tmp_path / 'prepared'}"), ("own", source)):
        for _ in range(2):
            runs.start(tmp_path / name, _config(text, "characters"))
        opened.append(runs.load(tmp_path / name))
    linked, own = opened
    assert linked.tokenizer == own.tokenizer
    assert [path.name for path in (tmp_path / "linked" / "data").iterdir()] == ["header.json"]
    for split in ("train", "valid", "test"):
        ours, theirs = (run.split(split).batch(3, batch_size=4, seed=1) for run in opened)
        assert np.array_equal(ours, theirs)
    (shard,) = (tmp_path / "prepared").glob("test-*.bin")
    content = shard.read_bytes()
    shard.write_bytes(content[::-1])
    with pytest.raises(ValueError, match=r"test-00000.bin is damaged"):
        runs.start(tmp_path / "linked", linked.config)
    shard.write_bytes(content)
    shutil.rmtree(tmp_path / "prepared")
    prepare.prepare(source, "bytes", tmp_path / "prepared", num_workers=1)
    for read in (lambda: runs.start(tmp_path / "linked", linked.config), lambda: linked.split("valid")):
        with pytest.raises(ValueError, match=r"prepared has changed since this run began with it"):
            read()


def test_a_run_refuses_text_prepared_with_another_tokenizer(tmp_path, source):
    prepare.prepare(source, "characters", tmp_path / "prepared", num_workers=1)
    for tokenizer in ("text8", "bytes", "sentencepiece:300"):
        config = _config(f"prepared:{tmp_path / 'prepared'}", tokenizer)
        wanted = rf"config.data.tokenizer={tokenizer} is another tokenizer .*: set it to characters, or prepare"
        with pytest.raises(ValueError, match=wanted):
            runs.start(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    prepare.prepare(source, "text8", tmp_path / "text8", num_workers=1)
    runs.start(tmp_path / "run", _config(f"prepared:{tmp_path / 'text8'}", "text8"))


def _ranks(path, *, shift=0):
    """A file of ranks in tiktoken's format: all single bytes, from another one on."""
    tokens = [bytes([(byte + shift) % 256]) for byte in range(256)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


def _word_pieces(path, *, shift=0):
    pieces = ["[UNK]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(pieces[shift:] + pieces[:shift]) + "\n")
    return path


KINDS = pytest.mark.parametrize(("kind", "write"), [("gpt2", _ranks), ("wordpiece", _word_pieces)])


@pytest.fixture
def no_network(monkeypatch):
    def get_encoding(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)


def test_prepared_text_whose_model_of_pieces_is_damaged_is_named(source, tmp_path):
    prepare.prepare(source, "bytes", tmp_path / "p", num_workers=1)
    _edit_header(tmp_path / "p", kind="sentencepiece", model="bm8gbW9kZWw=")
    with pytest.raises(errors.UserError, match=rf"^{tmp_path}/p/header.json: this is no SentencePiece model"):
        prepare.read_tokenizer(tmp_path / "p")


def _edit_header(directory, **fields):
    header = json.loads((directory / "header.json").read_text())
    header["tokenizer"] |= fields
    (directory / "header.json").write_text(json.dumps(header))


@KINDS
@pytest.mark.parametrize("names_it", ["as it was", "where it is"])
def test_prepared_text_brings_its_tokenizer_to_another_machine(
    tmp_path, source, no_network, capsys, kind, write, names_it
):
    pytest.importorskip("tokenizers", reason="word pieces need pip install tokenizers")
    file = write(tmp_path / "here" / "file")
    spec = f"{kind}:{file}"
    assert (
        cli.main(["prepare", f"--data={source}", f"--tokenizer={spec}", f"--out={tmp_path}/p", "--num_workers=1"]) == 0
    )
    file.parent.rename(tmp_path / "there")
    (tmp_path / "p").rename(tmp_path / "moved")
    capsys.readouterr()
    assert cli.main(["prepare", f"--describe={tmp_path}/moved"]) == 0
    assert "train begins:" in capsys.readouterr().out
    spec = spec if names_it == "as it was" else f"{kind}:{tmp_path}/there/file"
    runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/moved", spec))
    run = runs.load(tmp_path / "run")
    run.tokenizer.decode(run.split("train").batch(0, batch_size=1, seed=0)[0])
    write(tmp_path / "other", shift=1)
    with pytest.raises(errors.UserError, match=r"other is another tokenizer than .*moved was prepared with"):
        runs.start(tmp_path / "b", _config(f"prepared:{tmp_path}/moved", f"{kind}:{tmp_path}/other"))


@KINDS
def test_text_of_earlier_versions_is_read_with_the_tokenizer_that_is_named(tmp_path, source, capsys, kind, write):
    """They recorded the path of the tokenizer's file and kept no copy."""
    pytest.importorskip("tokenizers", reason="word pieces need pip install tokenizers")
    spec = f"{kind}:{write(tmp_path / 'here' / 'file')}"
    prepare.prepare(source, spec, tmp_path / "p", num_workers=1)
    for name in ("gpt2.tiktoken", "vocab.txt"):
        (tmp_path / "p" / name).unlink(missing_ok=True)
    text = prepare.describe(tmp_path / "p")["sample"]
    runs.start(tmp_path / "a", _config(f"prepared:{tmp_path}/p", spec))
    (tmp_path / "here").rename(tmp_path / "there")
    assert cli.main(["prepare", f"--describe={tmp_path}/p"]) == 1
    wanted = (
        f"the tokenizer's file {tmp_path}/here/file is missing: put it back, or say where it is now by --tokenizer="
    )
    assert f"{wanted}{kind}:FILE\n" in capsys.readouterr().err
    now = f"{kind}:{tmp_path}/there/file"
    assert cli.main(["prepare", f"--describe={tmp_path}/p", f"--tokenizer={now}"]) == 0
    assert text in capsys.readouterr().out
    runs.start(tmp_path / "b", _config(f"prepared:{tmp_path}/p", now))
    assert runs.load(tmp_path / "b").tokenizer.fingerprint() == runs.load(tmp_path / "a").tokenizer.fingerprint()
    with pytest.raises(errors.UserError, match="here/file does not exist: put it back, or name where it is now"):
        runs.start(tmp_path / "c", _config(f"prepared:{tmp_path}/p", spec))
    write(tmp_path / "other", shift=1)
    with pytest.raises(errors.UserError, match="other is another tokenizer than"):
        runs.start(tmp_path / "c", _config(f"prepared:{tmp_path}/p", f"{kind}:{tmp_path}/other"))
    (tmp_path / "other").rename(write(tmp_path / "here" / "file"))
    _edit_header(tmp_path / "p", path=f"{tmp_path}/nowhere")
    with pytest.raises(errors.UserError, match="here/file is another tokenizer than"):
        runs.start(tmp_path / "c", _config(f"prepared:{tmp_path}/p", spec))
    with pytest.raises(errors.UserError, match=r"^tokenizer=bytes is another tokenizer than"):
        prepare.describe(tmp_path / "p", "bytes")


def test_text_prepared_with_tiktokens_own_ranks_needs_no_network(tmp_path, source, no_network):
    file = _ranks(tmp_path / "ranks")
    prepare.prepare(source, f"gpt2:{file}", tmp_path / "p", num_workers=1)
    _edit_header(tmp_path / "p", path=None)
    assert prepare.read_tokenizer(tmp_path / "p").vocab_size == 257
    (tmp_path / "p" / "gpt2.tiktoken").rename(tmp_path / "ranks")
    with pytest.raises(errors.UserError, match="tiktoken cannot fetch them"):
        prepare.read_tokenizer(tmp_path / "p")
    assert prepare.read_tokenizer(tmp_path / "p", f"gpt2:{file}").vocab_size == 257


@pytest.mark.skipif(not SHARED.exists(), reason="GPT-2's ranks lie in ../shared, which is absent")
def test_gpt2_is_gpt2_by_whatever_name_without_a_network(tmp_path, source, no_network):
    prepare.prepare(source, f"gpt2:{SHARED}/tokenizers/gpt2.tiktoken", tmp_path / "p", num_workers=1)
    runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/p", "gpt2"))
    assert runs.load(tmp_path / "run").tokenizer.vocab_size == 50257


@pytest.mark.parametrize("fields", [{"kind": 5}, {"kind": []}, {"path": 5}, {"path": []}, {"sha256": 5}, {"a": 5}])
def test_a_damaged_description_of_a_tokenizer_is_named(tmp_path, source, fields):
    prepare.prepare(source, f"gpt2:{_ranks(tmp_path / 'ranks')}", tmp_path / "p", num_workers=1)
    (tmp_path / "p" / "gpt2.tiktoken").unlink()
    _edit_header(tmp_path / "p", **fields)
    with pytest.raises(errors.UserError, match=r"damaged|kind=.* is unknown|is missing|sha256"):
        prepare.read_tokenizer(tmp_path / "p")


def test_a_run_is_told_where_its_text_is_now(tmp_path, source, monkeypatch):
    for name, tokenizer in (("p", "characters"), ("other", "bytes")):
        prepare.prepare(source, tokenizer, tmp_path / name, num_workers=1)
    runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/p", "characters"))
    batch = runs.load(tmp_path / "run").split("train").batch(0, batch_size=2, seed=0)
    (tmp_path / "p").rename(tmp_path / "moved")
    remedy = "put it back, or train on with config.data.source=prepared:DIR"
    for read in (
        lambda: runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/p", "characters")),
        lambda: runs.load(tmp_path / "run").split("train"),
    ):
        with pytest.raises(
            errors.UserError, match=f"/p, the text of this run, holds no finished header.json: {remedy}"
        ):
            read()
    with pytest.raises(errors.UserError, match="other holds other text than this run began with: name the same text"):
        runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/other", "characters"))
    with pytest.raises(errors.UserError, match=r"none holds no finished header.json"):
        runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/none", "characters"))
    with pytest.raises(errors.UserError, match=r"was started with another config: config.data.source was"):
        runs.start(tmp_path / "run", _config(source, "characters"))
    runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/moved", "characters"))
    run = runs.load(tmp_path / "run")
    assert run.config.data.source == f"prepared:{tmp_path}/moved"
    assert np.array_equal(run.split("train").batch(0, batch_size=2, seed=0), batch)
    # Text that was prepared once more from another place is the same text.
    shutil.rmtree(tmp_path / "moved")
    (tmp_path / "text").rename(tmp_path / "texts")
    for name in ("moved", "again"):
        prepare.prepare(source.replace("/text/", "/texts/"), "characters", tmp_path / name, num_workers=1)
        runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/{name}", "characters"))
        assert np.array_equal(runs.load(tmp_path / "run").split("train").batch(0, batch_size=2, seed=0), batch)


def test_a_project_moves_with_its_runs_and_texts(tmp_path, source, monkeypatch):
    """Relative names then say the same, but a run holds the whole path of its text."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = _config("prepared:data/p", "characters")
    prepare.prepare(source, "characters", pathlib.Path("data/p"), num_workers=1)
    runs.start(pathlib.Path("run"), config)
    monkeypatch.chdir(tmp_path)
    runs.start(pathlib.Path("here/run"), config)  # The path of its text still holds.
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    runs.start(pathlib.Path("run"), config)
    assert runs.load("run").split("train").num_tokens == 2009


@KINDS
def test_a_run_gets_the_file_of_its_tokenizer_back(tmp_path, source, kind, write, capsys):
    pytest.importorskip("tokenizers", reason="word pieces need pip install tokenizers")
    file = write(tmp_path / "here" / "file")
    prepare.prepare(source, f"{kind}:{file}", tmp_path / "p", num_workers=1)
    runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/p", f"{kind}:{file}"))
    lost = tmp_path / "run" / {"gpt2": "gpt2.tiktoken", "wordpiece": "vocab.txt"}[kind]
    content = lost.read_bytes()
    lost.unlink()
    (tmp_path / "here").rename(tmp_path / "there")
    assert cli.main(["sample", f"--workdir={tmp_path}/run", "--num_processes=1"]) == 1
    wanted = f"{lost} is missing: put it back, or train on with config.data.tokenizer={kind}:FILE, which puts it back"
    assert wanted in capsys.readouterr().err
    write(tmp_path / "other", shift=1)
    for wrong in (f"{kind}:{tmp_path}/other", "characters", "bytes"):
        with pytest.raises(errors.UserError, match=rf"{wrong} is another tokenizer than the run's, .* with sha256"):
            runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/p", wrong))
    runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/p", f"{kind}:{tmp_path}/there/file"))
    assert lost.read_bytes() == content
    assert runs.load(tmp_path / "run").config.data.tokenizer == f"{kind}:{tmp_path}/there/file"
    # The tokenizer is the same by whatever name, but another one stays refused.
    runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/p", f"{kind}:{lost}"))
    with pytest.raises(errors.UserError, match=r"was started with another config: config.data.tokenizer was"):
        runs.start(tmp_path / "run", _config(f"prepared:{tmp_path}/p", f"{kind}:{tmp_path}/other"))


def test_a_test_set_alone_is_no_text_to_train_on(tmp_path):
    (tmp_path / "test.txt").write_text("letters " * 100)
    prepare.prepare(f"lines:{tmp_path}/{{split}}.txt", "text8", tmp_path / "prepared", num_workers=1)
    with pytest.raises(ValueError, match=r"the split 'train' is not in .*prepared: choose one of test"):
        runs.start(tmp_path / "run", _config(f"prepared:{tmp_path / 'prepared'}", "text8"))


def test_a_worker_that_is_killed_is_said_wherever_that_is_noticed(monkeypatch):
    class Pool:
        def __init__(self, *args, **options):
            pass

        def submit(self, *task):
            raise concurrent.futures.process.BrokenProcessPool

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    texts = iter([documents.Document("a", "place", 1.0)])
    with pytest.raises(errors.UserError, match=r"a process that tokenized was killed, .*: use fewer num_workers"):
        list(encoders.encode(texts, tokenizers.build("bytes", lambda: iter(())), num_workers=2))


def test_ids_that_are_no_tokens_are_named_by_a_description(tmp_path):
    (tmp_path / "train.txt").write_text("a = 1\n" * 400)
    prepare.prepare(f"text:{tmp_path}/train.txt", "characters", tmp_path / "out", num_workers=1)
    (shard,) = (tmp_path / "out").glob("valid-*.bin")
    content = shard.read_bytes()
    shard.write_bytes(b"\xff\xff" + content[2:])
    with pytest.raises(errors.UserError, match=r"split valid: .*65535"):
        prepare.describe(tmp_path / "out")
