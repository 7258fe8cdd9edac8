"""The transformer: its parts, how they are stacked and scanned, its adapters, and what a backward pass keeps."""
