"""The encoder, its heads, and foreign checkpoints."""
