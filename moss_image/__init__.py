"""MOSS-Image, Base and SFT: read family.py first, then model.py.

configs: dimensions of a transformer, latents, noise, names of parts
family: MOSS-Image, described for the shared loops
files: transformers in all layouts, the language model, FLUX.2's autoencoder
layouts: captions with boxes, which follow their image to its bucket
model: the transformer, with one modulation for all blocks
names: what it is called everywhere, from scripts to tensors
options: own options for caching, training and generation
references: images to edit, as the text encoder sees them
schedule: noise levels of a generation
"""
