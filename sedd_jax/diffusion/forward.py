"""The forward process as one value: a graph and a noise schedule."""

import dataclasses

from sedd_jax.diffusion import graphs, noise_schedules


@dataclasses.dataclass(frozen=True)
class Process:
    """The forward process.

    Attributes:
        graph: which token may turn into which.
        noise: noise schedule, the total noise sigma(t) at time t.
    """

    graph: graphs.Graph
    noise: noise_schedules.NoiseSchedule
