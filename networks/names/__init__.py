"""Module names in every layout; each model family lists its own in names.py.

layouts: dataclasses for module names, and patterns that rename tensors
texts: module paths of text encoders, published and in diffusers
"""
