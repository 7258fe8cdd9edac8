"""Devices: which one a run is on, and how much memory it and its host have."""
