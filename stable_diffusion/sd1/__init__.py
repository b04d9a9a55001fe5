"""Stable Diffusion 1.x and 2.x: train_network.py, its caches and generation.

family: the description, for these kinds of checkpoints
names: entry of the scripts in the list
options: options of the scripts, in addition to the shared ones
"""
