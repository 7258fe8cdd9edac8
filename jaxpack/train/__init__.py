"""The training step, and the run around it with metrics, evaluation, checkpoints and reports."""
