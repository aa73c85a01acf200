"""Trains an experiment."""
