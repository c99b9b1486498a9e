"""Runs of a moment, in processes of their own: text, surroundings, and what is compared."""

import json
import os

import numpy as np


def write_letters(directory, size):
    """Files train.txt, valid.txt and test.txt of random letters; the source that names them."""
    for split in ("train", "valid", "test"):
        letters = np.random.default_rng(0).choice(list("abcdefgh "), size=size)
        (directory / f"{split}.txt").write_text("".join(letters), encoding="utf-8")
    return f"text:{directory}/{{split}}.txt"


def environment(compiled, num_devices=1):
    """For a process with CPU devices that optimises little and keeps every compiled program in a directory."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=1",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def without_speed(metrics):
    """Lines of metrics.jsonl, each without how fast its step was."""
    records = [json.loads(line) for line in metrics.splitlines()]
    return [{name: value for name, value in record.items() if "per_second" not in name} for record in records]


def logged(workdir):
    return without_speed((workdir / "metrics.jsonl").read_text())
