"""Text encoders and autoencoders that several families use; clip_l.py is the simplest example.

autoencoder: FLUX's autoencoder: pixels to latents and back, its files
autoencoder_blocks: layers of FLUX's autoencoder
clip_checkpoints: files of CLIP's text and image towers
clip_l: CLIP-L for the shared loops, and its tokenizer
clip_layers: CLIP's towers, and layers shared with SigLIP
control_pictures: control images in caches, batches and samples
files: files of one transformer, and what follows
inversion: the vectors of a new word that learn
language_encoder: language models for the shared loops; chat templates
language_models: files of Llama, Qwen, Mistral, and their networks
language_states: running language models, and the states of layers
new_words: words that text encoders read as further rows
picture_prompts: images in prompts, through a vision tower
pictures: cache entries of single images, colors of latents
t5: T5-XXL for the shared loops, and ByT5 for letters
t5_network: the encoder networks of T5 and umT5, their files
text_encoder: tokenizers, rows of tokens, weights, counting, loading
tiles: overlapping pieces and their joining; posterior draws
vision_towers: towers that see images: Qwen2.5-VL's and Qwen3-VL's
"""
