"""The training step and the run around it: metrics, evaluation, checkpoints, reports."""
