"""The mathematics of the paper: forward process, loss, reverse steps and samplers, as pure functions of arrays."""
