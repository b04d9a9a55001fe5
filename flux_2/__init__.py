"""FLUX.2 dev and klein: read family.py first, then model.py.

configs: dimensions of a transformer, latents, names of parts
family: FLUX.2, described for the shared loops
files: transformer files and paths of a run, each checked
model: blocks over images and text, with one modulation
names: what it is called everywhere, from scripts to tensors
options: own options for caching, training and generation
vae: FLUX.2's autoencoder and its files
versions: releases and what each takes, as data
"""
