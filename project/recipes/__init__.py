"""Values of a training run in a file, with what they were tried on and its figures."""
