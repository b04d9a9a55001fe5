"""Describe the names of networks' modules in every layout; each family lists its own in names.py.

layouts: records of names and their order; renaming of tensors
texts: paths of text encoders' modules, as published and in diffusers
"""
