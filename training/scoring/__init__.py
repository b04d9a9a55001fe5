"""Score the samples of a run: how well they fit their prompts and the training images."""
