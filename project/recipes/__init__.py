"""Values of a training run in a file, with what they were tried on and its figures.

options: which recipe to save, and where
reading: reads a recipe, and refuses all but its values
saving: makes a recipe of a finished run
"""
