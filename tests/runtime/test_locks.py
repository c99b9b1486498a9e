"""A directory that is being made or trained has one owner, and a dead one leaves it."""

import fcntl
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from sedd_jax.runtime import errors, locks

HOLD = (
    "import pathlib, sys; from sedd_jax.runtime import locks\n"
    "with locks.owned(pathlib.Path(sys.argv[1]), 'workdir'): print('owned', flush=True); sys.stdin.read()"
)


def _holder(place):
    """A process that owns a directory."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "owned\n"
    return child


def _owns(place):
    with locks.owned(place, "out"):
        pass


@pytest.mark.parametrize("exists", [False, True])
def test_a_second_process_is_told_who_owns_it(tmp_path, exists):
    place = tmp_path / "runs" / "mine"
    if exists:
        place.mkdir(parents=True)
    child = _holder(place)
    said = rf"workdir={place} is in use by process {child.pid} on \S+ since 2\d\d\d-.*: wait until it ends, or stop it"
    with pytest.raises(errors.UserError, match=said), locks.owned(place, "workdir"):
        pass
    child.communicate()
    _owns(place)
    assert {path.name for path in place.parent.iterdir()} == ({"mine"} if exists else set())


def test_an_owner_that_was_killed_owns_nothing(tmp_path):
    child = _holder(tmp_path / "mine")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    _owns(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_every_name_of_a_directory_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("mine")
    monkeypatch.chdir(tmp_path / "mine")
    with locks.owned(tmp_path / "mine", "out"):
        for name in (tmp_path / "link", pathlib.Path(), pathlib.Path("../mine/")):
            with pytest.raises(errors.UserError, match=f"in use by process {os.getpid()} on"):
                _owns(name)


def test_who_opened_the_file_of_an_owner_that_ends_begins_again(tmp_path, monkeypatch):
    """Between its opening and locking the file, the owner removes it and a third process makes another."""
    place, path = tmp_path / "mine", tmp_path / ".mine.lock"
    lock, others = fcntl.flock, []

    def late(file, how):
        if not others:
            path.unlink()
            others.append(path.open("a+"))
            lock(others[0], how)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(errors.UserError, match="in use by another process"):
        _owns(place)
    others[0].close()


def test_a_closed_parent_is_no_matter(tmp_path, monkeypatch):
    place = tmp_path / "mine"
    place.mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != tmp_path and allowed(path, mode))
    with locks.owned(place, "out"):
        assert [path.name for path in place.iterdir()] == [locks.INSIDE]
        with pytest.raises(errors.UserError, match="in use by process"):
            _owns(place)
    assert not list(place.iterdir())


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), PermissionError(13, "Permission denied")])
def test_a_file_system_without_locks_has_no_owners(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locks.owned(tmp_path / "mine", "out"):
        _owns(tmp_path / "mine")
    assert re.fullmatch(r"(\.mine\.lock)?", "".join(path.name for path in tmp_path.iterdir()))


@pytest.mark.parametrize("call", [1, 2])
def test_a_file_that_goes_away_while_it_is_looked_at_is_no_lock(tmp_path, monkeypatch, call):
    """Another owner, of a file that was made since this one was opened, ends."""
    path, stat, calls = tmp_path / ".mine.lock", pathlib.Path.stat, []

    def late(self, **options):
        if self == path:
            calls.append(self)
            if len(calls) == call:
                path.unlink()
        return stat(self, **options)

    monkeypatch.setattr(pathlib.Path, "stat", late)
    with locks.owned(tmp_path / "mine", "out"):
        assert f"process {os.getpid()} on" in path.read_text()
