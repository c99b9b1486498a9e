"""Devices, processes, storage and terminals."""
