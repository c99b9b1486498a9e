"""The arrays recorded from the published program (see golden/README.md): what they are, and how near ours must come.

Tests take them by `cases`, which parametrises over the manifest; test_goldens.py fails where none takes an entry.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sedd_jax.conversion import torch_weights
from sedd_jax.diffusion import forward, graphs, losses, noise_schedules
from sedd_jax.model import networks, objectives, score_heads
from tests.support import places

ROOT = places.GOLDEN
NOISES = {
    "loglinear": noise_schedules.LogLinear(eps=1e-3),
    "geo": noise_schedules.Geometric(sigma_min=1e-4, sigma_max=20.0),
    "geo1": noise_schedules.Geometric(sigma_min=1e-3, sigma_max=1.0),
}
claimed: set[tuple[str, str]] = set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the manifest.

    Attributes:
        file: path below tests/support/golden.
        name: name of the array, "*" for a whole file of tensors.
        role: input, output, truth64 or original_noisy.
        tolerance: the manifest's numbers, by their names there.
    """

    file: str
    name: str
    role: str
    tolerance: Mapping[str, float]

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"

    @property
    def expected(self) -> Any:
        return load(self.file) if self.name == "*" else load(self.file)[self.name]

    def check(self, actual: Any) -> None:
        """Asserts that ours is as near to the recorded array as the manifest asks."""
        if self.name == "*":
            _check_tensors(self, actual)
            return
        actual, expected = np.asarray(actual, np.float64), np.asarray(self.expected, np.float64)
        assert actual.shape == expected.shape
        assert np.isfinite(actual).all()
        allowed = np.full_like(expected, self.tolerance.get("atol", 0.0))
        if "rtol_of_row_max" in self.tolerance:
            allowed += self.tolerance["rtol_of_row_max"] * np.abs(expected).max(-1, keepdims=True)
        elif "per_row_scale_rtol" in self.tolerance:
            rows = np.abs(expected).max(tuple(range(1, expected.ndim)), keepdims=True)
            allowed += self.tolerance["per_row_scale_rtol"] * rows
        else:
            allowed += self.tolerance["rtol"] * np.abs(expected)
        error = np.abs(actual - expected)
        worst = np.unravel_index((error - allowed).argmax(), error.shape)
        assert (error <= allowed).all(), (
            f"{self} at {worst}: {actual[worst]} is not {expected[worst]} +- {allowed[worst]}"
        )


def _check_tensors(entry: Entry, actual: Mapping[str, np.ndarray]) -> None:
    expected = entry.expected
    assert set(actual) - {torch_weights.ROTARY} == set(expected)
    error = {name: np.abs(np.float64(actual[name]) - expected[name]) for name in expected}
    if "rtol_of_tensor_max" in entry.tolerance:
        for name, tensor in expected.items():
            assert error[name].max() <= entry.tolerance["rtol_of_tensor_max"] * np.abs(tensor).max(), name
        return
    errors = np.concatenate([e.ravel() for e in error.values()])
    assert np.quantile(errors, 0.999) <= entry.tolerance["tol_q999"]
    assert errors.max() <= entry.tolerance["tol_max"]


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every line of the manifest."""
    lines = json.loads((ROOT / "manifest.json").read_text())["arrays"]
    tolerances = {(line["file"], line["name"]): {k: v for k, v in line.items() if "tol" in k} for line in lines}
    for (file, name), tolerance in tolerances.items():
        # The scale of a row belongs to the quantity; the manifest gives it for the float32 array of the pair only.
        tolerance |= {k: v for k, v in tolerances.get((file, name[:-5]), {}).items() if k == "per_row_scale_rtol"}
    return tuple(
        Entry(file=line["file"], name=line["name"], role=line["role"], tolerance=tolerances[line["file"], line["name"]])
        for line in lines
    )


def select(file: str, pattern: str = "") -> list[Entry]:
    """Entries to compare with, of files and names that match the patterns; they count as covered."""
    found = [
        entry
        for entry in entries()
        if entry.role in ("output", "truth64") and re.fullmatch(file, entry.file) and re.search(pattern, entry.name)
    ]
    assert found, f"no golden array matches {file} {pattern}"
    claimed.update((entry.file, entry.name) for entry in found)
    return found


def cases(file: str, pattern: str = "", *, slow: str | None = None) -> pytest.MarkDecorator:
    """Parametrises a test by `select`; those in whose name the expression `slow` is found are slow."""
    entries = [
        pytest.param(entry, marks=pytest.mark.slow) if slow and re.search(slow, str(entry)) else entry
        for entry in select(file, pattern)
    ]
    return pytest.mark.parametrize("entry", entries, ids=str)


@functools.cache
def load(file: str) -> Any:
    """The arrays of a recorded file by name, or the contents of a JSON file."""
    path = ROOT / file
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return dict(arrays)


@functools.cache
def model(name: str) -> tuple[networks.NetworkConfig, graphs.Graph, networks.Params]:
    """The recorded network `absorb_a` or `uniform_a`: sizes, graph and weights."""
    published = load(f"model_{name}/config.json")
    graph: graphs.Graph = (
        graphs.Absorbing(vocab_size=published["tokens"], mask_id=published["tokens"])
        if published["graph"]["type"] == "absorb"
        else graphs.Uniform(vocab_size=published["tokens"])
    )
    sizes = published["model"]
    config = networks.NetworkConfig(
        num_states=graph.num_states,
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["n_blocks"],
        num_heads=sizes["n_heads"],
        cond_dim=sizes["cond_dim"],
        dropout=sizes["dropout"],
        scale_by_sigma=sizes["scale_by_sigma"],
        dtype="float32",
    )
    return config, graph, torch_weights.from_torch(load(f"model_{name}/model.safetensors"), config)


def log_score(name: str, params: networks.Params, xt: jax.Array, sigma: jax.Array) -> jax.Array:
    """log score of a recorded network under other or the same weights."""
    network = networks.Model(model(name)[0], params)
    return score_heads.log_score(network, networks.apply(network, xt, sigma), xt, sigma)


def mean_loss(
    name: str, noise: str, params: networks.Params, x0: jax.Array, xt: jax.Array, t: jax.Array
) -> tuple[jax.Array, losses.Bounds]:
    """What training minimises, and the bounds of each sequence, for a recorded network."""
    config, graph, _ = model(name)
    process = forward.Process(graph, NOISES[noise])
    summary_fn = objectives.summary_fn(networks.Model(config, params), process)
    bounds = losses.bounds(summary_fn, process, x0, xt, t)
    return jnp.mean(bounds.score_entropy), bounds
