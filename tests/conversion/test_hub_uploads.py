"""`sedd push` against a Hub on loopback: what is shown is what is sent, to whom it may go, and errors of one line."""

import json
import os
import pathlib
import pty
import shutil
import socket
import subprocess
import sys

import pytest

pytest.importorskip("huggingface_hub", reason="pip install -e '.[test-all]'")

import huggingface_hub.constants

from sedd_jax import runs
from sedd_jax.cli import main as cli
from sedd_jax.conversion import convert, hub_uploads
from tests.support import hub_emulator, places

# huggingface_hub sends large files in a way that its HTTP library no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN, OTHER = "hf_secretsecretsecret", "hf_othersothersothers"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on which ada may write for ada, and this process is ada's."""
    with hub_emulator.Server({TOKEN: {"ada"}, OTHER: {"bob"}}) as server:
        environment = server.environment(str(tmp_path / "home"))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # huggingface_hub has read the environment when it was imported.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        yield server


@pytest.fixture
def written(tmp_path):
    directory = tmp_path / "written"
    target = convert.Target(directory=directory, to_format="torch")
    convert.convert(places.GOLDEN / "model_absorb_a", target, verify=False)
    return directory


def push(*arguments):
    return cli.main(["push", *map(str, arguments)])


def of_directory(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_is_shown_is_what_is_sent_to_a_private_repository(hub, written, capsys):
    (written / "optimizer.pt").write_bytes(b"large")
    (written / "log.txt").write_text("private")
    (written / "vocab.txt").symlink_to("/etc/hostname")
    assert push(f"--from={written}", "--to=ada/model", "--yes") == 0
    printed = capsys.readouterr()
    repository = hub.repositories["ada/model"]
    assert repository.is_private
    unwanted = {"optimizer.pt", "log.txt", "vocab.txt"}
    assert repository.files == {name: data for name, data in of_directory(written).items() if name not in unwanted}
    assert repository.commits == ["Upload a model that sedd_jax has trained or converted"]
    shown = dict(line.split()[:2] for line in printed.out.splitlines() if line.endswith(" bytes") and line[0] == " ")
    assert shown == {name: f"{len(data):,}" for name, data in repository.files.items()}
    assert printed.out.startswith(f"to the private repository ada/model on {hub.url}:\n")
    assert "not uploaded: log.txt, optimizer.pt, vocab.txt\n" in printed.out
    assert "ada/model does not exist yet and will be made" in printed.out
    assert printed.out.endswith(f"uploaded: {hub.url}/ada/model/commit/{hub_emulator.REVISION}\n")
    assert any(request.startswith("PUT /lfs/") for request in hub.requests)
    assert "secret" not in printed.out + printed.err


def test_without_a_terminal_nothing_is_uploaded(hub, written, capsys, monkeypatch):
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert push(f"--from={written}", "--to=ada/model") == 1
    printed = capsys.readouterr()
    assert "config.json" in printed.out
    assert printed.err == (
        "sedd push: nothing was uploaded, since there is no terminal to ask at: give --yes to upload what is listed\n"
    )
    assert not hub.requests


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 1), ("", 1)])
def test_at_a_terminal_the_answer_decides(hub, written, capsys, monkeypatch, answer, status):
    controlling, terminal = pty.openpty()
    os.write(controlling, f"{answer}\n".encode())
    with open(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert push(f"--from={written}", "--to=ada/model") == status
    os.close(controlling)
    printed = capsys.readouterr()
    assert f"upload these {len(of_directory(written))} files? [y/N] " in printed.err
    assert ("ada/model" in hub.repositories) == (status == 0)
    assert ("nothing was uploaded" in printed.out) == (status == 1)


def test_a_public_repository_takes_files_only_when_asked_for(hub, written, capsys):
    hub.repositories["ada/model"] = hub_emulator.Repository(is_private=False)
    assert push(f"--from={written}", "--to=ada/model", "--yes") == 1
    error = capsys.readouterr().err
    assert "--to=ada/model is a public repository, so nothing was uploaded: give --public if" in error
    assert not hub.repositories["ada/model"].files
    assert push(f"--from={written}", "--to=ada/model", "--yes", "--public") == 0
    assert hub.repositories["ada/model"].files == of_directory(written)
    out = capsys.readouterr().out
    assert "to the public repository ada/model" in out
    assert "ada/model exists and is public; files of the same names are replaced" in out


def test_public_makes_a_new_repository_public_and_leaves_a_private_one_private(hub, written, capsys):
    hub.repositories["ada/old"] = hub_emulator.Repository(is_private=True)
    for name in ("new", "old"):
        assert push(f"--from={written}", f"--to=ada/{name}", "--yes", "--public") == 0
    assert not hub.repositories["ada/new"].is_private
    assert hub.repositories["ada/old"].is_private
    assert "ada/old exists and is private, and stays so" in capsys.readouterr().out


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "secret" not in error
    return error


@pytest.mark.parametrize(
    ("token", "to", "message"),
    [
        ("", "ada/model", "there is no token for the Hub, so nothing was uploaded: log in with `hf auth login`, or"),
        ("hf_secret_but_wrong", "ada/model", "the Hub does not accept the token: log in with `hf auth login`, or"),
        (TOKEN, "bob/model", "the token may not write to bob/model: use one that may write for bob"),
        (TOKEN, "bob/public", "the token may not write to bob/public: use one that may write for bob"),
        (TOKEN, "model", "--to=model is no name of a repository: give OWNER/NAME, such as ada/my-sedd"),
        (TOKEN, "ada/a--b", "--to=ada/a--b is no name of a repository: give OWNER/NAME"),
        (TOKEN, "../model", "--to=../model is no name of a repository: give OWNER/NAME"),
    ],
)
def test_who_may_not_upload_there_is_told_why(hub, written, capsys, monkeypatch, token, to, message):
    hub.repositories["bob/public"] = hub_emulator.Repository(is_private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(f"--from={written}", f"--to={to}", "--yes", *(["--public"] if to == "bob/public" else [])) == 1
    assert message in one_line(capsys)
    assert not any(repository.files for repository in hub.repositories.values())


@pytest.mark.parametrize(
    ("route", "status", "message"),
    [
        ("/commit/main", 404, "the Hub has no ada/model, or the token may not see it: correct the name or the token"),
        ("/commit/main", 413, "the Hub refuses with status 413 (too much of it): mend that, or try again later"),
        ("/api/validate-yaml", 400, "the Hub refuses with status 400 (too much of it): mend that, or try again later"),
        ("PUT /lfs/", 403, "the token may not write to ada/model"),
    ],
)
def test_what_the_hub_refuses_is_named(hub, written, capsys, route, status, message):
    def refuse(method, path):
        if route in f"{method} {path}" and method != "GET":
            raise hub_emulator.RefusedError(status, "too much of it")

    hub.before = refuse
    assert push(f"--from={written}", "--to=ada/model", "--yes") == 1
    assert message in one_line(capsys)


def test_a_hub_that_repeats_the_token_is_not_quoted(hub, written, capsys):
    def refuse(method, path):
        raise hub_emulator.RefusedError(418, f"no tea for {TOKEN}")

    hub.before = refuse
    assert push(f"--from={written}", "--to=ada/model", "--yes") == 1
    assert "status 418 (no tea for ***)" in one_line(capsys)


def test_no_network_is_named(hub, written, capsys, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
    assert push(f"--from={written}", "--to=ada/model", "--yes") == 1
    assert f"{place} does not answer (ConnectError): connect to the network, or correct HF_ENDPOINT" in one_line(capsys)


def test_without_the_extra_its_name_is_said(written, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert push(f"--from={written}", "--to=ada/model", "--yes") == 1
    assert "the Hub needs a package: pip install 'sedd_jax[hub]'" in one_line(capsys)


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
def test_a_file_that_changes_after_it_was_shown_is_not_sent(hub, written, capsys, name):
    def change(method, path):
        if path == "/api/models/ada/model":
            with (written / name).open("ab") as file:
                file.write(b"more")

    hub.before = change
    assert push(f"--from={written}", "--to=ada/model", "--yes") == 1
    assert f"{name} has changed since it was shown, so nothing was uploaded: give the command again" in one_line(capsys)
    assert not hub.repositories


@pytest.mark.parametrize("in_memory", [2**24, 1000])
def test_what_changes_during_the_upload_is_sent_as_shown_or_not_at_all(hub, written, capsys, monkeypatch, in_memory):
    monkeypatch.setattr(hub_uploads, "_IN_MEMORY", in_memory)
    before = of_directory(written)

    def change(method, path):
        if path.endswith("/preupload/main"):
            with (written / "model.safetensors").open("r+b") as file:
                file.seek(100_000)
                file.write(b"other")

    hub.before = change
    status = push(f"--from={written}", "--to=ada/model", "--yes")
    assert of_directory(written) != before
    files = hub.repositories["ada/model"].files
    if in_memory > len(before["model.safetensors"]):
        assert (status, files) == (0, before)
    else:
        assert (status, files) == (1, {})
        assert "model.safetensors has changed since it was shown, so nothing was uploaded" in one_line(capsys)


def test_what_an_earlier_version_wrote_is_refused_with_its_directories(hub, written, capsys, tmp_path):
    config = json.loads((written / "config.json").read_text())
    config["sedd_jax"]["from"] = str(tmp_path / "run")
    (written / "config.json").write_text(json.dumps(config))
    assert push(f"--from={written}", "--to=ada/model", "--yes") == 1
    assert "config.json names a directory of this machine, as earlier versions wrote it: convert" in one_line(capsys)


def test_a_file_that_names_the_user_s_home_is_refused(hub, written, capsys, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "home", lambda: pathlib.Path("/home/ada"))
    with (written / "README.md").open("a") as card:
        card.write("see /home/ada/notes\n")
    assert push(f"--from={written}", "--to=ada/model", "--yes") == 1
    assert "README.md names /home/ada/: remove that from it" in one_line(capsys)


def test_other_directories_are_refused(hub, tmp_path, capsys, written):
    assert push(f"--from={places.GOLDEN / 'model_absorb_a'}", "--to=ada/model", "--yes") == 1
    assert "is neither a run directory nor a checkpoint that `sedd convert` wrote: it has no README.md" in one_line(
        capsys
    )
    (written / "model.safetensors").rename(tmp_path / "weights")
    (written / "model.safetensors").symlink_to(tmp_path / "weights")
    assert push(f"--from={written}", "--to=ada/model", "--yes") == 1
    assert "model.safetensors is a link: put the file itself there" in one_line(capsys)


@pytest.mark.slow
def test_nothing_of_a_run_but_its_converted_checkpoint_is_uploaded(hub, code_run, capsys, tmp_path):
    shutil.copytree(code_run, tmp_path / "run")
    assert push(f"--from={tmp_path / 'run'}", "--to=ada/run", "--yes") == 0
    files = hub.repositories["ada/run"].files
    expected = {"README.md", "config.json", "loss.png", "model.safetensors", "sedd_tokenizer.json", *convert.CODE}
    assert set(files) == expected
    assert not any(str(tmp_path).encode() in data or b"/tmp" in data for data in files.values())
    printed = capsys.readouterr().out
    assert f"{len(files)} files" in printed
    assert f"ema weights of step 2 of {tmp_path / 'run'}" in printed


@pytest.mark.slow
def test_the_command_uploads_and_what_it_uploaded_is_downloaded_and_converted(hub, written, tmp_path):
    environment = os.environ | hub.environment(str(tmp_path / "home"))
    sedd = lambda *arguments: subprocess.run(
        [sys.executable, "-m", "sedd_jax", *arguments], capture_output=True, text=True, env=environment
    )
    done = sedd("push", f"--from={written}", "--to=ada/model", "--yes")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    done = sedd("convert", "--from=ada/model", f"--to={tmp_path / 'back'}", "--noverify")
    assert done.returncode == 0, done.stderr
    assert runs.load(tmp_path / "back").graph.num_states == 27


def test_every_file_that_convert_writes_may_be_uploaded(written):
    assert {path.name for path in written.iterdir()} <= hub_uploads._ALLOWED
