"""Qwen-Image-2.1, base and Turbo: read family.py first, then model.py.

caches: hashes of references; whether latents and texts belong together
configs: dimensions of a transformer, latents, noise, names of parts
family: Qwen-Image-2.1, described for the shared loops
files: transformers in both layouts, Turbo's levels, encoders
model: the transformer, with attention in segments
names: what it is called everywhere, from scripts to tensors
options: own options for caching, training and generation
references: images to edit: sizes, masks
vae: the autoencoder, with transparency
"""
