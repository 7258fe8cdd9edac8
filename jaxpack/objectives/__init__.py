"""Objectives, which training minimises: sums over a batch that add up over rows, micro-batches and devices."""
