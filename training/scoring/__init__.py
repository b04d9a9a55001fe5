"""Score the samples of a run: how well they fit their prompts and the training pictures.

embeddings: vectors of pictures and clips, kept on disk by content
model: CLIP and SigLIP models of transformers
run: score a run after the options are read
training_pictures: the pictures a run learned from, and copies of them
"""
