"""A run directory in a bucket: one machine's old local copy never overwrites what another has written since."""

import dataclasses
import json
import shutil

import pytest

from sedd_jax import runs
from sedd_jax.evaluation import results
from sedd_jax.runtime import storage
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
