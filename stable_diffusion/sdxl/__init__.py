"""The scripts that train Stable Diffusion XL: sdxl_train_network.py and its caches."""
