"""Checkpoints to and from PyTorch and StableHLO."""
