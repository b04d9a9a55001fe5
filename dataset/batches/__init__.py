"""Cached items in the order of training.

captions: choose the text of each sample of a micro-batch
changing: captions that vary: shuffled parts, wildcards, several lines
finding: find cached items for training by their file names
items: training items, a million of them in columns
latent_space: check that cached latents belong to the model's VAE
live: tables encoded in part while training
order: order of batches, from names and a seed
reading: read, verify and stack cached items when they are needed
same_encoders: check that the same encoders made all caches
validation_split: which items are validated on, not trained on
"""
