"""From rows of a user's data to the batches of a run: reading, chat templates, packing, batching. Imports no jax."""
