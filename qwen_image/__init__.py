"""Qwen-Image: read family.py first, then model.py.

checkpoints: transformer files: what one is, and loading
configs: dimensions of a transformer, latents, names of parts
family: Qwen-Image, described for the shared loops
files: releases as data; paths of a run, each checked
model: double blocks over picture and text tokens
options: own options for caching, training and generation
references: pictures to edit: sizes, masks, what of them stays
text_encoder: what is taken from Qwen2.5-VL, as data
"""
