"""The forward process as one value: which token turns into which, and how fast."""

import dataclasses

from sedd_jax.diffusion import graphs, noise_schedules


@dataclasses.dataclass(frozen=True)
class Process:
    """The forward process.

    Attributes:
        graph: which token may turn into which.
        noise: how much noise a token has seen at time t.
    """

    graph: graphs.Graph
    noise: noise_schedules.NoiseSchedule
