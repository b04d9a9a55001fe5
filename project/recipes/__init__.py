"""Training values in a file, with the data they were tried on and the measured figures.

options: which recipe to save, and where
reading: reads a recipe, and refuses all but its values
saving: makes a recipe of a finished run
"""
