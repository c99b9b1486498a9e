"""A run directory in a bucket: one machine's old local copy never overwrites what another has written since."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import fsspec
import pytest

from sedd_jax import runs
from sedd_jax.evaluation import results
from sedd_jax.runtime import errors, storage
from tests.support import gcs_emulator


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    with gcs_emulator.Server("bucket") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield server


def test_keeping_a_result_brings_nothing_else_into_the_bucket(code_run, bucket):
    """Another machine has continued the run, and this one has an older local copy."""
    place = storage.directory("gs://bucket/run")
    shutil.copytree(code_run, storage.local_copy(place), ignore=shutil.ignore_patterns("checkpoints", "evaluations"))
    storage.upload(place)
    for name in ("metrics.jsonl", "data/header.json"):
        (place / name).write_text("newer")
    storage._sent.clear()  # As in a new process.
    run = dataclasses.replace(runs.load(code_run), workdir=place)
    results.write_parts(run, "parts-1", [{"part": 1}])
    results.keep(run, "other-1", {"kept": True})
    kept = {str(path.relative_to(place)) for path in (place / "evaluations").iterdir()}
    assert kept == {"evaluations/parts-1.jsonl", "evaluations/other-1.json"}
    assert json.loads((place / "evaluations" / "other-1.json").read_text())["kept"]
    assert {(place / name).read_text() for name in ("metrics.jsonl", "data/header.json")} == {"newer"}


def test_no_object_of_a_bucket_is_written_outside_the_copy(bucket, tmp_path):
    """Names of objects may hold .. between slashes."""
    place = storage.directory("gs://bucket/run")
    for name in ("data/header.json", "data/../../../../mine.txt"):
        fsspec.filesystem("gcs").pipe_file(f"bucket/run/{name}", b"theirs")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(errors.UserError, match=r"gs://bucket/run holds .*mine.txt.*, which is no name of a file in it"):
        storage.download(place, "data")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not storage.local_copy(place).exists()


def test_a_download_that_was_stopped_begins_again(bucket, monkeypatch):
    place = storage.directory("gs://bucket/run")
    local = storage.local_copy(place)
    for name in ("header.json", "test-00000.bin", "train-00000.bin"):
        path = local / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    storage.upload(place)
    shutil.rmtree(local)

    version = storage._version

    def stop(file):
        if file.name == "train-00000.bin":
            raise RuntimeError("stopped")
        return version(file)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_version", stop)
        with pytest.raises(OSError, match="stopped"):
            storage.download(place, "data")
    # header.json, which marks the text as complete, is not there.
    assert sorted(path.name for path in (local / "data").iterdir()) == ["test-00000.bin", "train-00000.bin"]
    storage.download(place, "data")
    assert (local / "data" / "header.json").read_text() == "header.json"


def test_what_a_bucket_no_longer_holds_goes_from_the_local_copy(bucket):
    """Results, samples or a tuned grid that somebody removed came back in a report, or were uploaded again."""
    place = storage.directory("gs://bucket/run")
    local = storage.local_copy(place)
    names = ["evaluations/a-1.json", "evaluations/b-1.json", "samples/old/1.txt", "time_grid.json", "metrics.jsonl"]
    for name in [*names, "data/header.json", "data/train-00000.bin"]:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_text(name)
    storage.upload(place)
    for name in ("evaluations/a-1.json", "samples/old/1.txt", "time_grid.json"):
        (place / name).unlink()
    (local / "samples" / "3.txt").write_text("of steps that another machine has trained again")
    storage.download(place, "evaluations", "samples", "time_grid.json", "data", "nothing")
    left = {str(path.relative_to(local)) for path in local.rglob("*")}
    kept = {"evaluations/b-1.json", "metrics.jsonl", "data/header.json", "data/train-00000.bin"}
    assert left == {*kept, "evaluations", "data"}
    assert all((local / name).read_text() == name for name in kept)


def _make(final, *names):
    with storage.new_directory(final) as partial:
        for name in names:
            (partial / name).mkdir()


@pytest.mark.parametrize("name", ["new", "deep/new", "empty", "link", "dangling", "."])
def test_a_new_directory_may_be_a_link_an_empty_one_or_the_current_one(tmp_path, monkeypatch, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch")
    (tmp_path / "dangling").symlink_to("elsewhere")
    if name == ".":
        monkeypatch.chdir(tmp_path / "empty")
    final = pathlib.Path(name) if name == "." else tmp_path / name
    assert storage.is_free(final)
    with pytest.raises(FileExistsError):
        _make(final, "a", "a")
    assert storage.is_free(final)
    _make(final, "a", "config.json")
    assert sorted(path.name for path in final.iterdir()) == ["a", "config.json"]
    assert not storage.is_free(final)
    assert (tmp_path / name).is_symlink() == (name in ("link", "dangling"))
    assert not list(tmp_path.rglob("*partial*"))


@pytest.mark.parametrize("exists", [False, True])
def test_what_a_kill_has_left_of_a_new_directory_goes(tmp_path, exists):
    final = tmp_path / "new"
    if exists:
        final.mkdir()
    left = final / ".partial" if exists else tmp_path / ".new.partial"
    (left / "old").mkdir(parents=True)
    assert storage.is_free(final)
    _make(final, "a")
    assert [path.name for path in final.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_marks_a_directory_as_complete_is_moved_last(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    moved, rename = [], pathlib.Path.rename
    monkeypatch.setattr(pathlib.Path, "rename", lambda path, to: [moved.append(path.name), rename(path, to)][1])
    _make(tmp_path / "empty", "config.json", "data", "tokenizer.json")
    assert moved == ["data", "tokenizer.json", "config.json"]


_KILLED = """
import os, pathlib, sys
from sedd_jax.runtime import storage

rename = pathlib.Path.rename
pathlib.Path.rename = lambda path, to: os._exit(9) if path.name == "tokenizer.json" else rename(path, to)
with storage.new_directory(pathlib.Path(sys.argv[1])) as partial:
    for name in ("data", "tokenizer.json", "config.json"):
        (partial / name).mkdir()
"""


def test_a_kill_between_two_moves_leaves_a_place_to_begin_anew(tmp_path):
    final = tmp_path / "mount"
    final.mkdir()
    assert subprocess.run([sys.executable, "-c", _KILLED, str(final)], timeout=120).returncode == 9
    assert {path.name for path in final.iterdir()} == {".partial", "data"}
    (final / "mine").touch()
    assert not storage.is_free(final)
    (final / "mine").unlink()
    assert storage.is_free(final)
    _make(final, "other", "config.json")
    assert {path.name for path in final.iterdir()} == {"other", "config.json"}
    assert not storage.is_free(final)


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    name = os.fsdecode(b"run\xff")
    with pytest.raises(errors.UserError, match="is no name in UTF-8, and checkpoints cannot be written there: give"):
        storage.directory(name)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(errors.UserError, match="is no name in UTF-8"):
        storage.directory("run")


def test_a_file_that_another_process_reads_is_replaced_and_not_cut(bucket):
    place = storage.directory("gs://bucket/run")
    (place / "data" / "a.bin").parent.mkdir(parents=True)
    (place / "data" / "a.bin").write_bytes(b"old")
    storage.download(place, "data")
    file = storage.local_copy(place) / "data" / "a.bin"
    with file.open("rb") as reader:
        (place / "data" / "a.bin").write_bytes(b"new")
        storage.download(place, "data")
        assert (reader.read(), file.read_bytes()) == (b"old", b"new")
    assert [path.name for path in file.parent.iterdir()] == ["a.bin"]
    assert [path.name for path in storage.local_copy(place).parent.iterdir()] == [storage.local_copy(place).name]
