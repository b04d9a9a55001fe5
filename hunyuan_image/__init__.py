"""HunyuanImage-2.1: read family.py first, then model.py.

configs: dimensions of a transformer, and usual settings
family: HunyuanImage-2.1, described for the shared loops
files: transformer files and paths of a run, each checked
model: HunyuanVideo's blocks over the pixels of an image
names: what it is called everywhere, from scripts to tensors
options: own options for caching, training and generation
text_encoders: a language model, and one for glyphs
vae: images to latents and back; its files
"""
