"""What a training step costs: cases, each measured in a process of its own, their records, a table and pictures."""
