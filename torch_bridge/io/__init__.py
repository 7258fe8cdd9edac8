"""Reads and writes weights on disk: single safetensors files, and folders of them. Needs no torch."""
