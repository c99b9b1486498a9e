"""Runs of a moment, in processes of their own: text, surroundings, and what is compared."""

import dataclasses
import json
import os

import numpy as np

from tests.support import compiling


def write_letters(directory, size):
    """Files train.txt, valid.txt and test.txt of random letters; the source that names them."""
    for split in ("train", "valid", "test"):
        letters = np.random.default_rng(0).choice(list("abcdefgh "), size=size)
        (directory / f"{split}.txt").write_text("".join(letters), encoding="utf-8")
    return f"text:{directory}/{{split}}.txt"


def environment(num_devices=1):
    """For a process with CPU devices. It shares the compiled programs of this test run."""
    return os.environ | {"XLA_FLAGS": compiling.flags(num_devices)}


def without_speed(metrics):
    """Lines of metrics.jsonl, each without what differs from process to process: speed and memory."""
    records = [json.loads(line) for line in metrics.splitlines()]
    same = lambda name: "per_second" not in name and not name.startswith("system/")
    return [{name: value for name, value in record.items() if same(name)} for record in records]


def logged(workdir):
    return without_speed((workdir / "metrics.jsonl").read_text())


def on_uniform_graph(trained, **changed):
    """An open run like `trained`, but on the uniform graph, with a network that nobody trained."""
    import jax

    from sedd_jax import config as configs
    from sedd_jax.model import networks

    config = trained.run.config
    network = dataclasses.replace(config.network, scale_by_sigma=False)
    config = dataclasses.replace(config, graph=configs.GraphConfig(name="uniform"), network=network)
    run = dataclasses.replace(trained.run, config=config, **changed)
    model = networks.Model(run.network, networks.init(jax.random.key(0), run.network))
    return dataclasses.replace(trained, run=run, step=0, model=model)
