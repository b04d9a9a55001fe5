"""Qwen-Image: read family.py first, then model.py.

caches: check that caches match the trained release
configs: dimensions of a transformer, latents, names of parts
family: Qwen-Image, described for the shared loops
files: releases as data; transformer files; paths, each checked
layered: Qwen-Image-Layered, which splits images into layers
model: double blocks over image and text tokens
names: its names everywhere, from scripts to tensors
options: own options for caching, training and generation
references: images to edit: sizes, masks, which parts are kept
workflow: ComfyUI nodes that generate its samples
"""
