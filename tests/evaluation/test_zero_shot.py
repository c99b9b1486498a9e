"""The paper's table has this run in it, and says what it lacks."""

import json
import re

import pytest

from sedd_jax.cli import main as cli
from sedd_jax.data import prepare
from sedd_jax.evaluation import zero_shot
from tests.support import places

FIGURES = places.SHARED / "PUBLISHED.md"


@pytest.fixture
def sets(tmp_path):
    """Two prepared sets of the run's alphabet: one with the split that the paper measured, one without."""
    (tmp_path / "text").mkdir()
    for name, splits in (("wikitext2", ("train", "valid", "test")), ("ptb", ("test",)), ("lambada", ("valid",))):
        for split in splits:
            (tmp_path / "text" / f"{name}.{split}.txt").write_text("a = 1\nb = 22\n" * 40)
    for name in ("wikitext2", "ptb", "lambada"):
        source = f"text:{tmp_path}/text/{name}.{{split}}.txt"
        prepare.prepare(source, "characters", tmp_path / "sets" / name, num_workers=1)
    return tmp_path / "sets"


@pytest.mark.slow
def test_the_suite_runs_what_it_finds_and_lists_what_it_does_not(code_run, sets, monkeypatch, capsys):
    for name in ("http_proxy", "https_proxy", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    arguments = ["--suite=zero_shot", f"--suite_data={sets}", "--num_times=2", "--num_processes=1", "--json"]
    assert cli.main(["eval", f"--workdir={code_run}", *arguments]) == 0
    *printed, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert set(result["sets"]) | set(result["missing"]) == set(zero_shot.SETS)
    assert result["missing"]["lambada"].endswith("has the splits valid, none of test")
    assert {"wikitext103", "lm1b"} <= set(result["missing"])
    assert result["sets"]["wikitext2"]["split"] == "train"
    assert result["sets"]["ptb"]["split"] == "test"
    rows = [line for line in printed if line.startswith("run step 2")]
    assert [len(re.findall(r"missing|±", row)) for row in rows] == [5, 5]
    assert all(row.count("missing") == 3 for row in rows)
    assert sum(line.startswith("missing: ") for line in printed) == 3
    # Another protocol is another result.
    kept = lambda: set((code_run / "evaluations").glob("zero_shot-*.json"))
    before = kept()
    assert cli.main(["eval", f"--workdir={code_run}", *arguments, "--protocol=strict"]) == 0
    assert len(kept()) == len(before) + 1


def test_nothing_found_is_a_failure(code_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zero_shot, "SETS", {"nothing": ("test",)})
    assert cli.main(["eval", f"--workdir={code_run}", "--suite=zero_shot", "--num_processes=1"]) == 1
    assert (
        "no set of the suite can be read: nothing: the source 'nothing' is of no known kind" in capsys.readouterr().err
    )
    assert cli.main(["eval", f"--workdir={code_run}", "--suite=zero_shot", "--split=test", "--num_processes=1"]) == 2


@pytest.mark.skipif(not FIGURES.exists(), reason="the published figures lie in ../shared, which is absent")
def test_figures_are_the_published():
    lines = FIGURES.read_text().splitlines()
    for title, figures in zero_shot.PUBLISHED.items():
        assert f"| {title} | {' | '.join(f'{figure:.2f}' for figure in figures)} |" in lines
