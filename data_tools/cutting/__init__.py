"""Cut footage into the clips of a dataset: find scenes, choose clips, write them and a list of them."""
