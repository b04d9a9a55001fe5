"""Fit a network into device memory: parts in host memory or other processes, recomputed activations."""
