"""What a run tells: the screen, metrics.jsonl, TensorBoard."""
