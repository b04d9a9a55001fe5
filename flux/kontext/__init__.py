"""FLUX.1 Kontext: FLUX.1 dev that edits an image, with the commands and caches of musubi-tuner.

family: Kontext, described for the shared loops
names: what it is called everywhere, from scripts to tensors
options: own options for caching, training and generation
"""
