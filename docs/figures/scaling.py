"""Prints the tables of docs/scaling.md: what `sedd plan` says about training steps on TPU slices.

pip install -e '.[tpu-plan]' && python docs/figures/scaling.py [TABLE ...]     # needs no TPU

The table `counted` takes seconds. Each row of the other tables is compiled, which takes one core 3 to 7 minutes.
"""

import os
import pathlib
import runpy
import sys
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax

from sedd_jax import config as configs
from sedd_jax.model import networks
from sedd_jax.performance import plan
from sedd_jax.runtime import accelerators

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SHAPES = {"small": (768, 12, 12), "medium": (1024, 24, 16), "1.5k": (1536, 24, 24), "2k": (2048, 24, 32)}
BLOCKS, ELEMENTWISE = {"network.remat": "blocks"}, {"network.remat": "elementwise"}
# Config, slice, and the fields that differ from the config's.
Row = tuple[str, str, dict[str, Any]]
COMPILED: dict[str, list[Row]] = {
    "slices": [
        ("owt_small", "v5e:4x4", BLOCKS),
        ("owt_small", "v5e:4x4", ELEMENTWISE),
        ("owt_medium", "v5e:4x4", BLOCKS),
        ("owt_small", "v5p:2x2x2", ELEMENTWISE),
        ("owt_medium", "v5p:2x2x2", ELEMENTWISE),
    ],
    "chips": [("owt_small", "v5e:16x16", ELEMENTWISE), ("owt_small", "2 x v5e:4x4", ELEMENTWISE)],
    "mesh": [
        ("owt_medium", "v5e:4x4", BLOCKS | {"mesh.fsdp": 16}),
        ("owt_medium", "v5e:4x4", BLOCKS | {"mesh.fsdp": 4, "mesh.tensor": 4}),
    ],
}


def compiled(name: str, where: str, fields: dict[str, Any]) -> str:
    """A row: GiB a device, milliseconds by unit, GB that a device sends by collective, and tokens/s at best."""
    given = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    config = configs.parse(configs.merge(configs.flatten(given) | fields))
    count, _, topology = where.rpartition(" x ")
    result = plan.plan(config, topology=topology, num_slices=int(count or 1))
    changes = ", ".join(f"{field.partition('.')[2]}={value}" for field, value in fields.items())
    if not result["fits"]:
        return f"| {name} | {where} | {changes} | does not fit: {result.get('remedy')} |"
    memory = list(result["memory_gib"].values())
    milliseconds = [f"{name} {1e3 * (seconds or 0):.1f}" for name, seconds in result["seconds"].items()]
    sent = [f"{kind} {of['bytes_sent'] / 1e9:.3f}" for kind, of in result["collectives"].items()]
    cells = [
        name,
        where,
        changes,
        f"{sum(memory[:3]):.2f} + {sum(memory[3:]):.2f} = {sum(memory):.2f} of {result['hbm_gib']:.0f}",
        ", ".join(milliseconds),
        ", ".join(sent),
        f"{result['tokens_per_second'] / 1e6:.2f} million, {result['utilization']:.0%}, {result['days']:.2f} days",
    ]
    return f"| {' | '.join(cells)} |"


def counted() -> None:
    """Print what follows from the shapes alone: weights, FLOPs, state, bytes of gradients to sum, floors on v5e."""
    chip, batch = accelerators.TPU_V5E, 512 * 1024
    for name in SHAPES:
        network, weights, gradients = shape(name)
        flops = network.flops_per_token(1024)
        row = f"{weights / 1e6:.0f} million | {flops / 1e9:.2f} | {16 * weights / accelerators.GIB:.1f}"
        print(f"| {name}, {network.hidden_size} x {network.num_layers} | {row} | {gradients / 1e9:.2f} |")
    small, _, gradients = shape("small")
    for length in (256, 512, 1024, 2048, 4096):
        flops = small.flops_per_token(length)
        attention, head = 12 * small.num_layers * small.hidden_size * length, 6 * small.hidden_size * small.num_states
        shares = f"{attention / flops:.0%} | {head / flops:.0%}"
        print(f"| {length} | {flops / 1e9:.2f} | {shares} | {1e3 * batch * flops / chip.peak_flops / 16:.0f} |")
    for chips in (4, 8, 16, 32, 64, 128, 256):
        arithmetic = batch * small.flops_per_token(1024) / chip.peak_flops / chips
        sent = 2 * (chips - 1) / chips * gradients
        milliseconds = f"{1e3 * arithmetic:.1f} | {1e3 * sent / chip.ici_bandwidth:.1f}"
        print(f"| {chips} | {512 // chips} | {milliseconds} | {batch / arithmetic / 1e6:.1f} million |")


def shape(name: str) -> tuple[networks.NetworkConfig, int, float]:
    """A network, its number of weights, and bytes of gradients; those of bfloat16 products are summed in bfloat16."""
    width, layers, heads = SHAPES[name]
    network = networks.NetworkConfig(num_states=50_258, hidden_size=width, num_layers=layers, num_heads=heads)
    tree = jax.eval_shape(lambda: networks.init(jax.random.key(0), network))
    weights = sum(leaf.size for leaf in jax.tree.leaves(tree))
    return network, weights, 4 * weights - 2 * layers * 12 * width**2


def main() -> None:
    for name in sys.argv[1:] or ("counted", *COMPILED):
        print(f"\n{name}", flush=True)
        if name == "counted":
            counted()
        for row in COMPILED.get(name, []):
            print(compiled(*row), flush=True)


if __name__ == "__main__":
    main()
