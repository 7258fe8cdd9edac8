"""Predicts what a run will cost in memory and time, and chooses settings by the predictions."""
