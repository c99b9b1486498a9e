"""Bounds on the likelihood of sequences, of texts, and of a text given another. Nothing here is kept or printed."""
