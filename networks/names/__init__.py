"""Describe the names of networks' modules in every layout; each family lists its own in names.py.

layouts: how names and their order are written down, renaming tensors
texts: published paths of text encoders' modules, and diffusers' ones
"""
