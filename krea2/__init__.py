"""Krea 2, raw, Turbo and edits: read family.py first, then model.py.

configs: dimensions of a transformer, latents, noise, names of parts
family: Krea 2, described for the shared loops
files: transformers in both layouts, VAE and text encoder
model: the transformer and its text fusion
names: what Krea 2 is called everywhere
options: own options for caching, training and generation
"""
