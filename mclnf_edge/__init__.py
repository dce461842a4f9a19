"""Streaming neural-field mapping for drones and edge computers."""

__version__ = "0.1.0"
