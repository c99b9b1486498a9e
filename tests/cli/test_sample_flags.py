"""`--out` is proven writable before anything is drawn, and a file there is replaced only by a whole one."""

import pathlib
import tempfile

import pytest

from sedd_jax.cli import main as cli
from sedd_jax.sampling import generate

SAMPLE = generate.Sample(
    text="a",
    tokens=[0],
    seed=0,
    index=0,
    step=1,
    sampler="tweedie",
    num_steps=1,
    nfe=2,
    draw="precise",
    refinements={},
)


def _refused(capsys, out):
    """Standard error of a command whose run does not exist, so that it would fail later."""
    assert cli.main(["sample", "--workdir=none", "--num_processes=1", f"--out={out}"]) == 1
    return capsys.readouterr().err


def test_a_directory_is_no_file(capsys, tmp_path):
    message = f"--out={tmp_path} is a directory: name a file in it, as in {tmp_path}/samples.jsonl"
    assert message in _refused(capsys, tmp_path)


@pytest.mark.parametrize("exists", [False, True])
def test_a_place_that_cannot_be_written(capsys, tmp_path, monkeypatch, exists):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    if exists:
        (tmp_path / "a.jsonl").write_text("mine")
        monkeypatch.setattr(pathlib.Path, "open", refuse)
    else:
        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    message = f"--out={tmp_path}/a.jsonl cannot be written (Permission denied): name a file in another directory"
    assert message in _refused(capsys, tmp_path / "a.jsonl")


def test_a_place_that_can_be_written_is_left_as_it_was(capsys, tmp_path):
    assert "--workdir=none" in _refused(capsys, tmp_path / "a.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_by_a_whole_one_only(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("mine")

    def fail(self, content, **_):
        with self.open("w") as file:
            file.write(content[:3])
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_text", fail)
        with pytest.raises(OSError, match="No space left"):
            generate.write_jsonl([SAMPLE], path)
    assert path.read_text() == "mine"
    generate.write_jsonl([SAMPLE], path)
    assert path.read_text() == generate.to_line(SAMPLE)


@pytest.mark.parametrize("content", ["mine", '{"template": "a {4}"}\n', "[1]\n", "3\n"])
def test_a_file_of_something_else_is_not_replaced(capsys, tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    message = f"--out={path} exists and holds no samples: name another file, or remove this one"
    assert message in _refused(capsys, path)
    assert path.read_text() == content


def test_earlier_samples_may_be_replaced(capsys, tmp_path):
    path = tmp_path / "a.jsonl"
    for content in ("", generate.to_line(SAMPLE)):
        path.write_text(content)
        assert "--workdir=none" in _refused(capsys, path)
