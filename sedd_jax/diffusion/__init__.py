"""The paper: forward process, loss, reverse steps and samplers, as pure functions of arrays."""
