"""What is built for an index of packages: its files, what it says of itself, and a quick start without a checkout."""

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

from sedd_jax.cli import main as cli
from sedd_jax.performance import inventory
from sedd_jax.runtime import errors, packaged
from tests.support import places

PROJECT = tomllib.loads((places.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
CONFIGS = sorted(path.stem for path in (places.REPOSITORY / "configs").glob("*.py"))


def _python(*arguments, **options):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The directory of an sdist, and of a wheel that was built from it."""
    pytest.importorskip("build", reason="pip install build")
    source, out = tmp_path_factory.mktemp("source") / "sedd_jax", tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "runs", "site", "*.egg-info", "__pycache__")
    shutil.copytree(places.REPOSITORY, source, ignore=unwanted)
    _python("-m", "build", "--no-isolation", "--outdir", out, source)
    return out


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_the_configs_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {f"sedd_jax/{path.relative_to(places.PACKAGE)}" for path in places.PACKAGE.rglob("*.py")}
    data = {"sedd_jax/runtime/accelerator_flags.txt", "sedd_jax/serving/page.html"}
    assert held == code | data | {f"sedd_jax/configs/{name}.py" for name in CONFIGS}


@pytest.mark.slow
def test_the_wheel_asks_for_what_is_required_and_has_its_extras(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    told = email.message_from_string(archive.read(name).decode())
    assert (told["Name"], told["Version"]) == ("sedd_jax", PROJECT["project"]["version"])
    assert told["License-Expression"] == "Apache-2.0"
    required = (places.REPOSITORY / "requirements.txt").read_text(encoding="utf-8")
    wanted = {re.match(r"[\w.-]+", line)[0] for line in required.splitlines() if line and line[0] != "#"}
    asked = [line for line in told.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w.-]+", line)[0] for line in asked} == wanted
    assert set(told.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])
    assert any("jax[cuda13]" in line for line in told.get_all("Requires-Dist"))


@pytest.mark.slow
def test_an_index_takes_the_package(built):
    pytest.importorskip("twine", reason="pip install twine")
    assert _python("-m", "twine", "check", "--strict", *built.iterdir()).count("PASSED") == 2


@pytest.mark.slow
def test_the_quick_start_runs_where_there_is_no_checkout(wheel, tmp_path):
    there = tmp_path / "site-packages"
    _python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", f"--target={there}", wheel)
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": str(there)}
    sedd = lambda *arguments: _python("-m", "sedd_jax", *arguments, cwd=tmp_path / "elsewhere", env=environment)
    few = ["num_steps=2", "eval_every=0", "sample_every=0", "batch_size=8"]
    sedd("train", "--config=quickstart", "--workdir=run", *(f"--config.training.{each}" for each in few))
    assert "bits/character" in sedd("eval", "--workdir=run", "--num_times=1")
    assert "The " in sedd("sample", "--workdir=run", "--template=The {5} method returns {8} object.", "--num_steps=2")
    assert f"sedd_jax {PROJECT['project']['version']}" in sedd("--version").splitlines()[0].split(", ")


def test_the_lock_is_of_these_requirements_and_of_public_places():
    """`uv lock` writes it again."""
    text = (places.REPOSITORY / "uv.lock").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://([^/\"]+)", text)) == {"pypi.org", "files.pythonhosted.org"}
    (ours,) = (package for package in tomllib.loads(text)["package"] if package["name"] == "sedd-jax")
    assert ours["version"] == PROJECT["project"]["version"]
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(ours["metadata"]["provides-extras"]) == set(extras)
    required = (places.REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    specifiers = [line.partition("#")[0] for line in required] + [line for lines in extras.values() for line in lines]
    wanted = {_named(line) for line in specifiers if line.strip()}
    assert {_named(each["name"] + each.get("specifier", "")) for each in ours["metadata"]["requires-dist"]} == wanted


def _named(requirement):
    """Name without its extras, and the versions in any order: ("jax", {"<0.13", ">=0.10"})."""
    found = re.match(r"\s*([\w.-]+)(?:\[[\w,-]*\])?(.*)", requirement)
    return found[1].replace("_", "-").lower(), frozenset(each.strip() for each in found[2].split(",") if each.strip())


def test_every_folder_of_the_package_is_built():
    folders = {path.parent for path in places.PACKAGE.rglob("*.py")}
    names = {".".join(folder.relative_to(places.REPOSITORY).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names | {"sedd_jax.configs"}


def test_a_packaged_config_is_found_by_its_name_and_another_by_its_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert packaged.config_names() == CONFIGS
    assert cli.main(["train", "--config=quickstart", "--help"]) == 0
    assert "--config.data.length=96 " in capsys.readouterr().out
    (tmp_path / "mine.py").write_text("def get_config():\n    return {'data': {'length': 33}}\n")
    assert cli.main(["train", "--config=mine.py", "--help"]) == 0
    assert "--config.data.length=33 " in capsys.readouterr().out


def test_a_config_that_is_neither_gets_the_names_there_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config=nonsense", "--workdir=run"]) == 1
    remedy = f"give a path, or one of {', '.join(CONFIGS)}"
    assert capsys.readouterr().err == f"sedd train: --config=nonsense is not a file of Python: {remedy}\n"
    assert cli.main(["train", "--config=quickstrat", "--workdir=run"]) == 1
    hint = f"did you mean 'quickstart'? {remedy}"
    assert capsys.readouterr().err == f"sedd train: --config=quickstrat is not a file of Python: {hint}\n"


def test_the_version_says_what_runs_here(monkeypatch, capsys):
    monkeypatch.setattr(inventory, "packages", lambda: {"sedd_jax": "9", "jax": "0.10.2", "numpy": "2.4"})
    monkeypatch.setattr(inventory, "cuda_libraries", lambda: {"CUDA": "13.0", "cuDNN": "9.19"})
    assert cli.main(["--version"]) == 0
    own, others, python, devices = capsys.readouterr().out.splitlines()
    assert own.startswith("sedd_jax")
    assert others == "jax 0.10.2, numpy 2.4"
    assert python == f"Python {sys.version.split()[0]}"
    assert devices == "8 x cpu, CUDA 13.0, cuDNN 9.19"


def test_the_version_is_told_where_jax_does_not_start(monkeypatch, capsys):
    monkeypatch.setattr(inventory, "devices", lambda: inventory.Devices([], [], "no driver"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no device, since JAX does not start: no driver"


def test_the_version_is_a_line_where_a_library_does_not_fit(monkeypatch, capsys):
    def refuse():
        raise errors.UserError("jax cannot be imported", remedy="install it again")

    monkeypatch.setattr(inventory, "check_imports", refuse)
    assert cli.main(["--version"]) == 1
    assert capsys.readouterr().err == "sedd --version: jax cannot be imported: install it again\n"


def test_the_workflow_runs_the_gate_of_this_repository_on_a_cpu():
    workflow = yaml.safe_load((places.REPOSITORY / ".github" / "workflows" / "gate.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    (command,) = (step for step in job["steps"] if "run" in step)
    assert command["run"] == "bash .ci/run"
    assert command["env"] == {"JAX_PLATFORMS": "cpu"}
    assert workflow["permissions"] == {"contents": "read"}
    assert (places.REPOSITORY / ".ci" / "run").is_file()


def test_the_citation_is_the_one_in_the_readme():
    citation = yaml.safe_load((places.REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    (paper,) = citation["references"]
    readme = (places.REPOSITORY / "README.md").read_text(encoding="utf-8")
    bibtex = readme.partition("```bibtex\n")[2].partition("```")[0]
    for shown in (citation["title"].split(": ")[0].replace("_", r"\_"), paper["title"], str(paper["year"])):
        assert shown in bibtex
    assert all(author["family-names"] in bibtex for author in paper["authors"])
