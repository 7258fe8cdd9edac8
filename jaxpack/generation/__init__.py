"""Generates text from a model: decoding with a cache, sampling, and the way from prompts to text."""
