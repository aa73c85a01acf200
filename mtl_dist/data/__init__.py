"""Reading, mixing, preparing and batching of task data."""
