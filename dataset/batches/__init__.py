"""Cached items in the order of training.

checks: whether cached entries are what the run needs
example: find the files of one training item
finding: find training items by names of cache files
given_parts: regions and times of items given as conditions
items: training items, and what is encoded during training
order: order of batches, sample captions, validation items
reading: read, verify and stack cached items when they are needed
starting: check caches and sources before a model is loaded
"""
