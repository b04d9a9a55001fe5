"""Runs of training as pages see them: their histories, states and files, and how to generate with them."""
