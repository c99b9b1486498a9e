"""The examples run as they stand, with fewer steps."""

import json
import runpy

import pytest

from tests.support import places

EXAMPLES = places.REPOSITORY / "examples"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, capsys):
    content = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    first = cells[0].replace("num_steps = 1800", "num_steps = 2")
    cells[0] = first.replace("runs/notebook", str(tmp_path / "run"))
    assert cells[0] != first
    variables = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), variables)
    printed = capsys.readouterr().out
    assert f"<sedd_jax run {tmp_path / 'run'}, step 2, absorb, 997," in printed
    assert printed.count("bits per character") == 2
    assert "'The " in printed


@pytest.mark.slow
def test_the_script_trains_fills_gaps_and_bounds(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "train_and_infill.py"))["main"]
    main(str(tmp_path / "run"), num_steps=2)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 5
    assert all(line.startswith("The ") for line in printed[:1])
    assert "bits per character" in printed[-1]
