"""Text from a model: decoding with a cache, sampling, and prompts in and text out."""
