"""Draws docs/figures/memory.png: memory of a training step of the small network on a TPU v5e chip, compiled for four.

pip install -e '.[tpu-plan]' && python docs/figures/memory.py     # needs no TPU; 5 minutes
"""

import os
import pathlib

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
from jax.experimental import topologies
from matplotlib import pyplot

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.runtime import sharding
from sedd_jax.training import train_steps

SEQUENCES, GIB = 8, 2**30  # sequences a device


def measure(vocab_size: int, length: int) -> dict[str, float]:
    """GiB of memory a device, by what it holds."""
    config = configs.parse(configs.merge({"data": {"length": length}, "training": {"batch_size": 4 * SEQUENCES}}))
    run = runs.unsaved(config, vocab_size)
    mesh = sharding.make_mesh(config.mesh, topologies.get_topology_desc("v5e:2x2", "tpu").devices)
    state, lowered = train_steps.lower_step(run, mesh)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params)) / GIB
    return {
        "state": memory.argument_size_in_bytes / GIB,
        "gradients": weights,
        "activations": (memory.peak_memory_in_bytes - memory.argument_size_in_bytes) / GIB - weights,
        "one array of logits": 4 * SEQUENCES * length * run.network.padded_states / GIB,
    }


def main() -> None:
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    sweeps = {
        "tokens in the vocabulary (length 1024)": [(size, (size, 1024)) for size in (1_000, 8_000, 50_257, 200_000)],
        "length (50,257 tokens)": [(length, (50_257, length)) for length in (256, 512, 1024, 2048)],
    }
    for panel, (label, points) in zip(panels, sweeps.items(), strict=True):
        measured = []
        for x, arguments in points:
            measured.append(measure(*arguments))
            print(label, x, {name: round(value, 3) for name, value in measured[-1].items()}, flush=True)
        for name in measured[0]:
            style = "k--" if name == "one array of logits" else "o-"
            panel.plot([x for x, _ in points], [values[name] for values in measured], style, label=name)
        panel.set(xscale="log", yscale="log", xlabel=label)
        panel.set_xticks([x for x, _ in points], [f"{x:,}" for x, _ in points])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("GiB a device")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
