"""FLUX.2 dev and klein: read family.py first, then model.py.

checkpoints: transformer files: what one is, and loading
configs: dimensions of a transformer, latents, names of parts
family: FLUX.2, described for the shared loops
files: paths of a run, each checked against its option
model: blocks over pictures and text, with one modulation
options: own options for caching, training and generation
text_encoders: what is taken from Mistral and Qwen3
vae: FLUX.2's autoencoder and its files
versions: releases and what each takes, as data
"""
