"""Anima, of any depth: read family.py first, then model.py.

adapter: small network that joins T5's tokens with Qwen3's states
configs: dimensions of a transformer, latents, noise, names of parts
family: Anima, described for the shared loops
files: transformers in both layouts, adapters in files of their own
lllite: a ControlNet-LLLite at work: files, in the transformer
lllite_modules: the small networks of a ControlNet-LLLite
model: Cosmos-Predict2's transformer for images, with the adapter
names: what Anima is called everywhere, from scripts to tensors
options: own options for caching, training and generation
text_encoder: Qwen3 (0.6B), and T5's tokenizer without T5
"""
