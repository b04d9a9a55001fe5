"""Optimizers, learning rates, and how weights are stepped."""
