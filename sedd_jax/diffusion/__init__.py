"""The mathematics of the paper: forward process, graphs, noise and loss, as pure functions of arrays."""
