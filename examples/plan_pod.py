"""Plan a training on TPUs that are not here: does it fit, how fast is it, how long does it take, on several slices.

    python examples/plan_pod.py [CONFIG] [TOPOLOGY ...]

CONFIG (owt_small if not given) is a packaged config or a file. It compiles the training step for each slice, which
takes a minute or two; nothing is run. Needs the extra tpu-plan.
"""

import sys

from sedd_jax.runtime import hosts

hosts.compile_for_others()  # Before JAX is imported.

from sedd_jax import config as configs  # noqa: E402
from sedd_jax import config_files  # noqa: E402
from sedd_jax.performance import plan  # noqa: E402

TOPOLOGIES = ("v5e:4x4", "v5e:8x8", "v5p:2x2x4")


def main(name: str = "owt_small", *topologies: str, **changed: dict) -> None:
    config = configs.parse(configs.merge({**config_files.read_python(name), **changed}))
    for topology in topologies or TOPOLOGIES:
        found = plan.plan(config, topology=topology)
        print(plan.table(found))
        if not found["fits"]:
            print(f"{topology} needs {found.get('remedy', 'another network or batch')}")
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
