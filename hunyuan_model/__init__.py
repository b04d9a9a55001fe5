"""HunyuanVideo and SkyReels V1: read family.py first, then model.py.

blocks: attention of video and text: double and single blocks
checkpoints: transformer files: dialects, kinds, loading
configs: dimensions of a transformer, and training settings
family: HunyuanVideo and SkyReels V1, described for the shared loops
files: paths of a run, each checked against its option
joining: video and text tokens side by side, written once
model: the transformer, with the names of published checkpoints
names: what it is called everywhere, from scripts to tensors
official_options: the release's command line, in our words
options: own options for caching, training and generation
spec: latents, guidance and names in the transformer
text_encoders: a language model and CLIP-L, for the shared loops
token_refiner: language model states to text tokens
vae: clips to latents and back; SkyReels' first frame
vae_blocks: causal convolutions and norms over a clip
vae_checkpoints: VAE files: dialects, dimensions from tensors
"""
