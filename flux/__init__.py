"""FLUX.1 and Chroma: read family.py first, then model.py.

blocks: attention of images and text: double and single blocks
configs: dimensions of a transformer, releases and their settings
control_net: files of ControlNets, and what one adds to the blocks
control_net_learning: a ControlNet in training, a copy of the first blocks
family: FLUX.1 and Chroma, described for the shared loops
files: transformer files and paths of a run, each checked
kontext/: the variant that edits a reference image
model: the transformer, with the names of published checkpoints
names: what it is called everywhere, from scripts to tensors
official_options: the image guides' command line, in our words
options: own options for caching, training and generation
spec: latents, noise and names in the transformer
workflow: the nodes of ComfyUI that make its samples
"""
