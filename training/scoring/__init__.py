"""Score the samples of a run: how well they fit their prompts and the training images.

embeddings: vectors of images and clips, kept on disk by content
model: CLIP and SigLIP models of transformers
run: options of tools/score.py, and scores of a run
tags: how many of a prompt's tags a tagger sees
training_pictures: the images a run learned from, and copies of them
"""
