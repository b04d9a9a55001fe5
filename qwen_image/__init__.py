"""Qwen-Image: read family.py first, then model.py.

caches: checks in training that caches are from the same release
configs: dimensions of a transformer, latents, names of parts
family: Qwen-Image, described for the shared loops
files: releases as data; transformer files; paths, each checked
layered: Qwen-Image-Layered, which takes images apart into layers
model: double blocks over image and text tokens
names: what it is called everywhere, from scripts to tensors
options: own options for caching, training and generation
references: images to edit: sizes, masks, what of them stays
workflow: the nodes of ComfyUI that make its samples
"""
