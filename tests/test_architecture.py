"""The floors of the house: imports never go up or in a circle, and heavy libraries stay in their rooms."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "sedd_jax"
FLOORS = (
    (
        "accelerators",
        "attentions",
        "benchmark_published",
        "categoricals",
        "collectives",
        "graphs",
        "documents",
        "hosts",
        "noise_schedules",
        "processes",
        "regexes",
        "sandbox",
        "sharding",
        "storage",
        "tables",
        "tiles",
        "time_grids",
        "torch_model",
    ),
    ("controls", "networks", "score_draws", "score_heads"),
    (
        "alphabets",
        "autoregression",
        "constraints",
        "corpora",
        "detokenizers",
        "encoders",
        "first_hitting",
        "hub_corpora",
        "losses",
        "moves",
        "metric_writers",
        "optimizers",
        "published_corpora",
        "python_corpora",
        "samplers",
        "second_order",
        "step_bounds",
        "subwords",
        "text_files",
        "tfds_text_files",
        "tokenizers",
        "torch_files",
        "torch_weights",
        "verification",
    ),
    (
        "batches",
        "checkpoints",
        "config",
        "curves",
        "initial_weights",
        "judges",
        "likelihoods",
        "model_cards",
        "patterns",
        "published_checkpoints",
        "published_configs",
        "results",
        "runs",
        "score_export",
        "shards",
        "slots",
        "templates",
        "terminals",
        "train_state",
    ),
    (
        "benchmark",
        "benchmark_ours",
        "code_problems",
        "code_quality",
        "convert",
        "evaluate",
        "generate",
        "generation_quality",
        "infilling",
        "plan",
        "prepare",
        "prompts",
        "quality_curves",
        "refill",
        "report",
        "serve",
        "serve_pieces",
        "serve_queue",
        "serve_requests",
        "sliding_blocks",
        "train",
        "tune_grid",
        "zero_shot",
    ),
    ("arguments", "cli", "evaluations"),
    ("__main__",),
)
ROOMS = {
    "flax": {"networks", "train_state"},
    "orbax": {"checkpoints"},
    "ml_collections": {"config", "arguments"},
    "tensorflow_datasets": {"hub_corpora", "tfds_text_files"},
    "datasets": {"hub_corpora"},
    "sentencepiece": {"subwords"},
    # The first is run by the reference's interpreter.
    "torch": {"benchmark_published", "judges", "torch_files", "torch_model", "verification"},
    "transformers": {"judges"},
    "mauve": {"infilling"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
}
FORBIDDEN = ("tensorflow", "clu")
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def _imports(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _ours(module: str) -> set[str]:
    return {name.split(".")[1] for name in _imports(module) if name.startswith("sedd_jax.")}


def _floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if module in rooms)


def test_every_module_has_a_floor():
    assert sorted(room for floor in FLOORS for room in floor) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_go_up(module):
    above = {name for name in _ours(module) if _floor(name) > _floor(module)}
    assert not above


def test_imports_are_never_circular():
    waiting = {module: _ours(module) for module in MODULES}
    while waiting:
        free = {module for module, needs in waiting.items() if not needs & set(waiting)}
        assert free, f"circular imports among {sorted(waiting)}"
        waiting = {module: needs for module, needs in waiting.items() if module not in free}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_stay_in_their_rooms(module):
    libraries = {name.split(".")[0] for name in _imports(module)}
    assert not libraries & set(FORBIDDEN)
    for library, rooms in ROOMS.items():
        assert library not in libraries or module in rooms


def test_modules_are_rooms_not_halls():
    long = {path.name: n for path in PACKAGE.glob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from sedd_jax import cli; cli.main(['--help']); "
        "print([m for m in ('jax', 'flax', 'orbax', 'matplotlib', 'tiktoken', 'pyarrow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.splitlines()[-1] == "[]"
