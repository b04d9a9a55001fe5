"""What waits in host memory, and what is computed again, so that a network fits."""
