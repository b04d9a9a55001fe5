"""Lumina-Image-2.0: read family.py first, then model.py.

blocks: attention and feed-forward, modulated by the time
configs: dimensions of the transformer, as data
family: Lumina-Image-2.0, described for the shared loops
files: transformer files and paths of a run, each checked
model: the transformer, with the names of published checkpoints
names: what it is called everywhere, from scripts to tensors
official_options: the image guides' command line, in our words
options: own options for caching, training and generation
text_encoder: Gemma 2 behind the words of a system prompt
"""
