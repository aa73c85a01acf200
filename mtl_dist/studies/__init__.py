"""What is done with many runs, or before one."""
