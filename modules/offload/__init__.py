"""Fit a network into device memory: keep parts of it in host memory, and recompute activations."""
