"""FLUX.1 Kontext: FLUX.1 dev that edits a picture, with the known video tuner's commands and caches.

family: Kontext, described for the shared loops
options: own options for caching, training and generation
"""
