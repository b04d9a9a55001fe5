"""Make control pictures for the pictures of a folder.

depth: run a transformers model that estimates depth
options: options of tools/control_pictures.py: edges or depth, folders
run: write the control pictures that a folder lacks
"""
