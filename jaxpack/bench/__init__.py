"""Measures the cost of a training step: each case in its own process, then records, a table and pictures."""
