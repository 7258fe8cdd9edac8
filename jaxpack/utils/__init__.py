"""Holds helpers that every package uses: console, atomic file writes, figures, prefetching, compilation cache."""
