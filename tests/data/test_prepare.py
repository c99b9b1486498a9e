"""Tests of `sedd prepare`: it leaves finished text or none, describes it, and a run notices when it changes."""

import base64
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
from sedd_jax.data import detokenizers, prepare, shards
from sedd_jax.runtime import errors, storage
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


@pytest.mark.parametrize("told", slow.all_but([signal.SIGKILL], [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
def test_what_is_interrupted_does_not_look_finished_and_begins_anew(tmp_path, told):
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


def test_a_test_set_alone_is_no_text_to_train_on(tmp_path):
    (tmp_path / "test.txt").write_text("letters " * 100)
    prepare.prepare(f"lines:{tmp_path}/{{split}}.txt", "text8", tmp_path / "prepared", num_workers=1)
    with pytest.raises(ValueError, match=r"the split 'train' is not in .*prepared: choose one of test"):
        runs.start(tmp_path / "run", _config(f"prepared:{tmp_path / 'prepared'}", "text8"))
