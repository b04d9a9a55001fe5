"""The scripts that train Stable Diffusion 1.x and 2.x: train_network.py and its caches."""
