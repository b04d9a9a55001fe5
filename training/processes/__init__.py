"""Several processes, and their precision."""
