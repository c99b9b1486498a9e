"""Devices, processes, storage, terminals and errors."""
