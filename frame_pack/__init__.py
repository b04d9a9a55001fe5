"""FramePack and FramePack-F1: read family.py first, then sections.py.

batches: what training reads from caches, checked and named
blocks: HunyuanVideo's blocks with separate query, key and value
caching: latent caches: a file per section or image
checkpoints: transformer files: what one is, and loading
configs: dimensions of the transformer, as data
family: FramePack and FramePack-F1, described for the shared loops
files: paths of a run, each checked against its option
generating: denoises section by section, or a single image
image_checkpoints: files of the SigLIP image encoder
image_encoder: SigLIP: an image to 729 vectors
inputs: images of a request, encoded for its sections
model: the transformer, with the names of published checkpoints
one_frame: single images: one target frame with an index
options: own options for caching, training and generation
positions: rotary positions of tokens, by frame index
requests: sections and their texts, settled before loading
section_syntax: texts that differ by section of a video
sections: number and order of sections, what each sees
text_encoders: HunyuanVideo's two, with outputs in another form
"""
