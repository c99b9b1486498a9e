"""Untrusted programs: problems to solve by code, and the sandbox in which solutions are tried."""
