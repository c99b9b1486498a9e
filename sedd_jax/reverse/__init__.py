"""The reverse process of the paper: steps, samplers, correctors and time grids, as pure functions of arrays."""
