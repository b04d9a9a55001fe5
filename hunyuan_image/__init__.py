"""HunyuanImage-2.1: read family.py first, then model.py.

checkpoints: transformer files: what one is, dialects, loading
configs: dimensions of a transformer, and usual settings
family: HunyuanImage-2.1, described for the shared loops
files: paths of a run, each checked against its option
model: HunyuanVideo's blocks over the pixels of a picture
options: own options for caching, training and generation
text_encoders: a language model, and one for glyphs
vae: pictures to latents and back, 32 pixels to one
vae_blocks: encoder and decoder, pixels folded into channels
vae_checkpoints: VAE files: dialects, dimensions from tensors
"""
