"""The memory of a training run."""
