"""Measurements of a run: likelihood, quality of samples, infilling, code."""
