"""Krea 2, raw and Turbo: read family.py first, then model.py.

configs: dimensions of a transformer, its source, latents, noise, names of parts
family: Krea 2, described for the shared loops
files: the files of a run: transformers with released names and diffusers', VAE, text encoder
model: the transformer
options: own options for caching, training and generation
"""
