"""Where the system keeps no locks, a directory has one owner, too: in a bucket and on some network file systems."""

import errno
import fcntl
import itertools
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from sedd_jax.data import prepare
from sedd_jax.runtime import errors, leases, locks, storage
from tests.support import gcs_emulator

ELSEWHERE = "process 7 on another since yesterday\nanother boot 7\n"


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Seconds for minutes; an owner that was taken for dead is no end of this process."""
    monkeypatch.setattr(os, "_exit", lambda status: None)
    monkeypatch.setattr(leases, "RENEWED_SECONDS", 0.2)
    monkeypatch.setattr(leases, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(leases, "SETTLED_SECONDS", 0.1)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    with gcs_emulator.Server("bucket") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(params=["bucket", "network file system"])
def unlocked(request, tmp_path, monkeypatch):
    """A directory, and the file of its owner. Each lock is of a machine of its own: none is ever taken."""
    if request.param == "bucket":
        server = request.getfixturevalue("bucket")
        caches = iter(range(100))
        monkeypatch.setattr(storage, "local_copy", lambda place: tmp_path / f"machine-{next(caches)}" / "copy")
        yield storage.directory("gs://bucket/runs/mine"), storage.directory("gs://bucket/runs/mine") / locks.INSIDE
        assert not [name for name in server.blobs if name.endswith(locks.INSIDE)]
    else:

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        yield tmp_path / "mine", tmp_path / ".mine.lock"
        assert not list(tmp_path.iterdir())


def owns(directory):
    with leases.owned(directory, "workdir"):
        return True


def test_a_second_owner_is_told_who_the_first_is(unlocked, monkeypatch, capsys):
    directory, _ = unlocked
    said = rf"is in use by process {os.getpid()} on \S+ since 2\d\d\d-.*: wait until it ends, or stop it"
    with leases.owned(directory, "workdir"), pytest.raises(errors.UserError, match=said):
        owns(directory)
    assert f"may be in use by process {os.getpid()} on" in capsys.readouterr().err
    assert owns(directory)


def test_an_owner_on_another_machine_that_gives_no_sign_is_dead(unlocked, capsys):
    directory, file = unlocked
    storage.put_text(file, f"{ELSEWHERE}3\n")
    assert owns(directory)
    assert (
        "may be in use by process 7 on another since yesterday: this takes up to 2 seconds" in capsys.readouterr().err
    )


def test_an_owner_of_this_machine_that_is_gone_is_not_waited_for(unlocked, capsys):
    directory, file = unlocked
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    storage.put_text(file, f"process {child.pid} on here since now\n{leases._machine()} {child.pid}\n3\n")
    assert owns(directory)
    assert capsys.readouterr().err == ""


def test_a_file_that_says_nothing_is_nobody_s(unlocked):
    directory, file = unlocked
    storage.put_text(file, "")
    assert owns(directory)


def test_of_those_that_start_at_once_one_becomes_the_owner(unlocked, monkeypatch):
    """All find no file; each writes its own."""
    directory, _ = unlocked
    found, start, end = [], threading.Barrier(4), threading.Event()
    names, first = map(str, itertools.count()), iter(range(4))
    read = storage.get_text

    def read_together(file):
        text = read(file)
        if next(first, None) is not None:
            start.wait(20)
        return text

    monkeypatch.setattr(storage, "get_text", read_together)
    monkeypatch.setattr(socket, "gethostname", lambda: next(names))

    def note(what):
        found.append(what)
        if len(found) == 4:
            end.set()

    def attempt():
        try:
            with leases.owned(directory, "workdir"):
                note("owner")
                end.wait(20)
        except errors.UserError as error:
            note(str(error))

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(text == "owner" for text in found) == [False, False, False, True]
    assert sum("is in use by process" in text for text in found) == 3


def test_an_owner_that_was_taken_for_dead_ends(unlocked, monkeypatch, capsys):
    directory, file = unlocked
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: ended.set() if status == 1 else None)
    with leases.owned(directory, "workdir"):
        storage.put_text(file, f"{ELSEWHERE}0\n")
        assert ended.wait(20)
    assert storage.get_text(file) == f"{ELSEWHERE}0\n"
    storage.remove(file)
    assert "was taken over by process 7 on another since yesterday, which saw no sign" in capsys.readouterr().err


def test_a_bucket_out_of_reach_for_a_moment_is_no_end(bucket, tmp_path, monkeypatch):
    directory = storage.directory("gs://bucket/runs/mine")
    put, failed = storage.put_text, []

    def fail_twice(file, text):
        if text.endswith(("1\n", "2\n")) and len(failed) < 2:
            failed.append(text)
            raise OSError(errno.EIO, "unreachable")
        put(file, text)

    monkeypatch.setattr(storage, "put_text", fail_twice)
    with leases.owned(directory, "workdir"):
        file = directory / locks.INSIDE
        deadline = time.monotonic() + 30
        while not storage.get_text(file).endswith("3\n"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(failed) == 2


def test_text_is_prepared_in_a_bucket_by_one_machine(bucket, tmp_path):
    (tmp_path / "text.txt").write_text("words and words\n" * 100)
    directory = storage.directory("gs://bucket/text")
    with leases.owned(directory, "out"), pytest.raises(errors.UserError, match="in use by process"):
        prepare.prepare(f"text:{tmp_path}/text.txt", "characters", directory)


def test_a_lock_is_all_that_a_local_directory_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "put_text", None)
    with leases.owned(tmp_path / "mine", "out"):
        assert [path.name for path in tmp_path.iterdir()] == [".mine.lock"]
        with pytest.raises(errors.UserError, match="in use by process"), locks.owned(tmp_path / "mine", "out"):
            pass


def test_the_owner_s_file_is_no_run_that_is_in_the_way(unlocked):
    directory, _ = unlocked
    with leases.owned(directory, "workdir"):
        assert storage.is_free(directory)
