"""Makes the optimizer of a run: AdamW with moments in float32 or in 8 bits, or the user's own."""
