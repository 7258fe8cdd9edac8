"""Writes models as GGUF files, which llama.cpp and Ollama read; the format itself is that of the package gguf."""
