"""Wan2.1 and Wan2.2: read family.py first, then model.py.

caching: encodes items of a dataset for cache files
checkpoints: transformer files: dialects, variants, loading
chosen: options as the family's files, tasks, boundaries, dtypes
clip: CLIP ViT-H: an image to 257 vectors
conditioning: images and videos as conditions of the transformer
configs: dimensions of a transformer, meaning of each --task
encoder_checkpoints: umT5 and CLIP files: dialects, dimensions
family: Wan2.1 and Wan2.2, described for the shared loops
files: paths of a run, each checked against its option
inputs: images and videos of a request, encoded
model: the transformer, with the names of published checkpoints
options: own options for caching, training and generation
preparing: VAE and text encoder for prepare_dataset.py
releases: folders of whole releases, names of transformer files
spec: latents, and names inside the transformer
t5: umT5: each prompt to a list of vectors
tokens: what blocks get besides video: text, times, positions
vae: the video VAEs: pixels to latents and back
vae_blocks: layers of the VAEs, with memory between chunks
vae_checkpoints: VAE files: dialect, generation, dimensions
vae_releases: released VAEs: latents' kind and their normalisation
vae_shortcuts: paths without weights around the Wan2.2 VAE's stages
"""
