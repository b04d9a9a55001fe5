"""Cached items in the order of training.

finding: find cached items for training by their file names
items: training items in columns; tables encoded while training
order: order of batches, captions of samples, what is validated on
reading: read, verify and stack cached items when they are needed
same_encoders: check that the same encoders made all caches
"""
