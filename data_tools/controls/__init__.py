"""Make control images for the images in a folder."""
