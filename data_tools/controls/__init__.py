"""Make control images for the images in a folder.

depth: run a transformers model that estimates depth
edges_of_image: draw the edges of one image
run: options, and the control images that a folder lacks
"""
