"""Stable Diffusion XL: sdxl_train_network.py, its caches and generation."""
