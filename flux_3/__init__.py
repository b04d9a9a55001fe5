"""FLUX 3 Image Klein, base and distilled: read family.py first, then model.py.

configs: dimensions of a transformer, latents, noise, names of parts
family: FLUX 3, described for the shared loops
files: transformers in both layouts, the autoencoder and the text encoder
model: blocks of each kind of tokens alone, then joint blocks
names: what FLUX 3 is called everywhere
options: own options for caching, training and generation
references: sizes of reference images, and one on its canvas
"""
