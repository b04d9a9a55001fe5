"""Z-Image, base and Turbo: read family.py first, then model.py.

configs: dimensions of a transformer, latents, names of parts
family: Z-Image and its text encoder, described for the shared loops
files: transformer files: released names, and ComfyUI's
model: Lumina-Image-2.0's blocks with padding of learned tokens
names: what it is called everywhere, from scripts to tensors
options: own options for caching, training and generation
workflow: the nodes of ComfyUI that make its samples
"""
