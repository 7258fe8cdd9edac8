"""Reads and writes weights on a disk: one safetensors file, and folders of them. Needs no torch."""
