"""Turns a user's records into the batches of a run: reading, chat templates, packing, batching. Imports no jax."""
