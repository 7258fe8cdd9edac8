"""Predictions of what a run will cost in memory and time, and what to choose by them."""
