"""Make control pictures for the pictures of a folder.

depth: run a transformers model that estimates depth
run: options, and the control pictures that a folder lacks
"""
