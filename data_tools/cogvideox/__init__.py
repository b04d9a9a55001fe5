"""Prepare clips in CogVideoX form: choose frames and sizes, encode, write the folders that trainers read.

clips: choose frames and sizes of clips, read, encode
items: items of a prepared folder, and their files
models: VAE and text encoders of a diffusers pipeline
options: options of prepare_dataset.py: media, sizes, models
preparing: captions, then clips, then their lists; reruns continue
"""
