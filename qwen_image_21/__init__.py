"""Qwen-Image-2.1: pictures with transparency, from texts and up to ten reference pictures.

vae: the autoencoder of pictures with alpha, and its files
"""
