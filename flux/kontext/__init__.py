"""FLUX.1 Kontext: FLUX.1 dev that edits a picture, with the known video tuner's commands and caches.

family: Kontext, described for the shared loops
names: what it is called everywhere, from scripts to tensors
options: own options for caching, training and generation
"""
