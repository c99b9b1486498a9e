"""Benchmarks, and plans for devices that are not here."""
