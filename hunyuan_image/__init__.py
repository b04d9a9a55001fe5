"""HunyuanImage-2.1: read family.py first, then model.py.

checkpoints: transformer files: what one is, dialects, loading
configs: dimensions of a transformer, and usual settings
family: HunyuanImage-2.1, described for the shared loops
files: paths of a run, each checked against its option
glyphs: the texts in quotation marks of a prompt
model: HunyuanVideo's blocks over the pixels of a picture
options: own options for caching, training and generation
qwen: the language model of Qwen2.5-VL and its template
spec: latents, noise and names in the transformer
text_encoders: a language model, and one for glyphs
vae: pictures to latents and back, 32 pixels to one
vae_blocks: encoder and decoder, pixels folded into channels
vae_checkpoints: VAE files: dialects, dimensions from tensors
"""
