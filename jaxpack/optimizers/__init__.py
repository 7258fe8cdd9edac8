"""Makes the optimizer and the schedule of a run: the ones that its settings name, or the user's own."""
