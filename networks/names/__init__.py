"""Module names in every layout; each model family lists its own in names.py."""
