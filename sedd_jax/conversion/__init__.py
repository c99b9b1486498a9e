"""Conversion of checkpoints between run directories, PyTorch files and StableHLO."""
