"""The wings of the house: imports go down their list and never in a circle, and heavy libraries stay in their rooms."""

import ast
import itertools
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import jaxtyping
import pytest

from tests.support import places

# From top to bottom: a wing may import itself and those after it. A new module needs no entry.
WINGS = (
    "__main__",
    "cli",
    "front_door",
    "harness",
    "performance",
    "training",
    "conversion",
    "evaluation",
    "bounds",
    "serving",
    "sampling",
    "comparison",
    "runs",
    "config_files",
    "config",
    "checkpoints",
    "model",
    "programs",
    "data",
    "reverse",
    "diffusion",
    "runtime",
)
TRUE_PATH = (
    "cli.main",
    "training.train",
    "training.train_steps",
    "model.objectives",
    "diffusion.losses",
    "diffusion.graphs",
)
ROOMS = {
    "flax": {"model.networks", "model.train_state"},
    "orbax": {"checkpoints"},
    "ml_collections": {"config", "cli.arguments"},
    "tensorflow_datasets": {"data.hub_corpora", "data.tfds_text_files"},
    "datasets": {"data.hub_corpora"},
    "sentencepiece": {"conversion.modeling_sedd", "data.subwords"},
    # The first is run by the reference's interpreter.
    "torch": {
        "performance.benchmark_published",
        "evaluation.judges",
        "conversion.modeling_sedd",
        "conversion.torch_files",
        "conversion.torch_model",
        "conversion.verification",
    },
    "transformers": {"conversion.modeling_sedd", "evaluation.judges"},
    "lm_eval": {"harness"},
    "mauve": {"evaluation.refilling"},
    "starlette": {"serving.app"},
    "uvicorn": {"serving.app", "serving.connections"},
    "wandb": {"training.tracker_process"},
    "trackio": {"training.tracker_process"},
}
FORBIDDEN = ("tensorflow", "clu")
FILES = {
    ".".join(path.relative_to(places.PACKAGE).with_suffix("").parts): path
    for path in sorted(places.PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def _imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _ours(module: str) -> set[str]:
    return {name.removeprefix("sedd_jax.") for name in _imports(FILES[module]) if name.startswith("sedd_jax.")}


def _floor(module: str) -> int:
    return WINGS.index(module.split(".")[0])


def test_imports_are_of_modules():
    assert {name for module in FILES for name in _ours(module)} <= set(FILES)


@pytest.mark.parametrize("module", FILES)
def test_imports_never_go_up(module):
    above = {name for name in _ours(module) if _floor(name) < _floor(module)}
    assert not above


def test_the_mathematics_imports_only_jax_and_numpy():
    outside = {"jax", "jaxtyping", "numpy", "sedd_jax", *sys.stdlib_module_names}
    for module, path in FILES.items():
        if module.startswith(("diffusion.", "reverse.")):
            assert {name.split(".")[0] for name in _imports(path)} <= outside
            assert all(name.startswith(("diffusion.", "reverse.")) for name in _ours(module))


def test_the_path_from_the_command_line_to_the_loss_is_true():
    for module, following in itertools.pairwise(TRUE_PATH):
        assert following in _ours(module)
    shown = " -> ".join(f"`{module}`" for module in TRUE_PATH)
    assert shown in " ".join((places.PACKAGE / "__init__.py").read_text(encoding="utf-8").split())
    readme = (places.REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert " -> ".join(module.replace(".", "/") for module in TRUE_PATH) in readme


def test_imports_are_never_circular():
    waiting = {module: _ours(module) for module in FILES}
    while waiting:
        free = {module for module, needs in waiting.items() if not needs & set(waiting)}
        assert free, f"circular imports among {sorted(waiting)}"
        waiting = {module: needs for module, needs in waiting.items() if module not in free}


@pytest.mark.parametrize("module", FILES)
def test_heavy_libraries_stay_in_their_rooms(module):
    libraries = {name.split(".")[0] for name in _imports(FILES[module])}
    assert not libraries & set(FORBIDDEN)
    for library, rooms in ROOMS.items():
        assert library not in libraries or module in rooms


def test_modules_are_rooms_not_halls():
    long = {module: n for module, path in FILES.items() if (n := len(path.read_text().splitlines())) > 400}
    assert not long


def test_a_wing_has_few_rooms():
    wings = [path for path in places.PACKAGE.rglob("*") if path.is_dir() and any(path.glob("*.py"))]
    assert len(wings) == sum(wing not in FILES for wing in WINGS)
    full = {wing.name: n for wing in (*wings, places.PACKAGE) if (n := len(list(wing.glob("*.py")))) > 16}
    assert not full


@pytest.mark.parametrize("start", ["from sedd_jax.cli import main; main.main(['--help'])", "import sedd_jax"])
def test_help_and_import_load_no_heavy_library(start):
    code = (
        f"import sys; {start}; "
        "print([m for m in ('jax', 'flax', 'orbax', 'matplotlib', 'tiktoken', 'pyarrow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=places.REPOSITORY
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_types_and_shapes_are_checked_while_tests_run():
    from sedd_jax.diffusion import graphs

    with pytest.raises(jaxtyping.TypeCheckError, match="'5'"):
        graphs.Uniform(vocab_size="5")
    for _ in range(2):
        with pytest.raises(jaxtyping.TypeCheckError, match="B L"):
            graphs.Uniform(vocab_size=5).reverse_rate(jnp.zeros((2, 3, 4), int))
