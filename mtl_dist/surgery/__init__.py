"""Gradient surgery: from each task's gradient to the one that is applied."""
