"""Stable Diffusion 1.x and 2.x: train_network.py, its caches and generation."""
