"""Cached items in the order of training.

items: find training items by names of cache files
order: order of batches, captions of samples, what is validated on
reading: read, verify and stack cached items when they are needed
same_encoders: check that the same encoders made all caches
starting: check caches and sources before a model is loaded
"""
