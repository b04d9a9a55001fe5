"""FramePack and FramePack-F1: read family.py first, then sections.py.

batches: what training reads from caches, checked and named
blocks: HunyuanVideo's blocks with separate query, key and value
caching: latent caches: a file per section or image
configs: dimensions of the transformer, as data
family: FramePack and FramePack-F1, described for the shared loops
files: transformer, text encoders, paths of a run, each checked
generating: denoises section by section, or a single image
image_encoder: SigLIP: an image to 729 vectors
inputs: images of a request, encoded for its sections
model: the transformer, with the names of published checkpoints
names: what it is called everywhere, from scripts to tensors
one_frame: single images: one target frame with an index
options: own options for each task; texts by section
requests: sections and their texts, settled before loading
sections: number and order of sections, what each sees
"""
