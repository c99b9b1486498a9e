"""Every recorded array is compared with ours by some test; recorded rows of text are, in test_detokenizers.py."""

import importlib

from tests.support import goldens

TAKERS = (
    "diffusion.test_noise_schedules",
    "diffusion.test_graphs",
    "diffusion.test_losses",
    "reverse.test_samplers",
    "model.test_networks",
    "model.test_optimizers",
    "conversion.test_torch_weights",
)


def test_every_recorded_array_is_taken_by_a_test():
    for module in TAKERS:
        importlib.import_module(f"tests.{module}")
    wanted = {(entry.file, entry.name) for entry in goldens.entries() if entry.role in ("output", "truth64")}
    assert wanted - goldens.claimed == set()


def test_every_noisy_recording_has_a_truth_that_is_taken():
    names = {(entry.file, entry.name) for entry in goldens.entries() if entry.role == "truth64"}
    for entry in goldens.entries():
        if entry.role == "original_noisy":
            assert {(entry.file, entry.name + suffix) for suffix in ("_true", "__f64")} & names
