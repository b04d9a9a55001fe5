"""Prepare clips in CogVideoX form: choose frames and sizes, encode, write the folders that trainers read.

clips: items and their files; frames, sizes, encoding
models: VAE and text encoders of a diffusers pipeline
options: options of prepare_dataset.py: media, sizes, models
preparing: captions, then clips, then their lists; reruns continue
"""
