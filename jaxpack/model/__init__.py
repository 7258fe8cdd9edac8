"""Defines the transformer: its parts, how layers are scanned, its adapters, and which residuals are kept."""
