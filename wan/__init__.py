"""Wan2.1 and Wan2.2: read family.py first, then model.py.

caching: encodes items of a dataset for cache files
checkpoints: transformer files: dialects, variants, loading
clip: CLIP ViT-H: an image to 257 vectors
configs: dimensions, tasks and released VAEs as data
family: Wan2.1 and Wan2.2, described for the shared loops
files: paths of a run, whole releases, what options choose
inputs: images and videos as conditions of the transformer
model: the transformer, with the names of published checkpoints
names: what it is called everywhere, from scripts to tensors
one_frame: a single image from control images: places, conditions, caches
options: own options for caching, training and generation
spec: latents, names inside, what blocks get besides video
t5: umT5: each prompt to a list of vectors
vace: control of VACE: clip, mask, references as channels
vace_model: the second stack of blocks, which gives hints
vace_training: control of items, to caches and to conditions
vae: the video VAEs: pixels to latents and back
vae_blocks: layers of the VAEs, with memory between chunks
vae_checkpoints: VAE files: dialect, generation, dimensions
vae_shortcuts: paths without weights around the Wan2.2 VAE's stages
workflow: the nodes of ComfyUI that make its samples
"""
