"""Make control pictures for the pictures of a folder.

depth: run a transformers model that estimates depth
edges_of_image: draw the edges of one image
run: options, and the control pictures that a folder lacks
"""
