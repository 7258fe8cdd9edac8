"""Objectives: what training minimises, as sums over a batch that can be added over rows, micro-batches and devices."""
