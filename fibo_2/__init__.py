"""Fibo 2.0, dev and edit-turbo: read family.py first, then model.py.

captions: captions as JSON, cleaned and checked
configs: dimensions, states of the text, noise, names of parts
family: Fibo 2.0, described for the shared loops
files: transformers in all layouts, Qwen3-VL, FLUX.2's autoencoder
model: the transformer, with gist tokens and reading blocks
names: what it is called everywhere, from scripts to tensors
options: own options for caching, training and generation
references: images to edit, their sizes and masks
texts: the text encoder, behind captions as JSON
"""
