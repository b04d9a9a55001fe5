"""Cached items in the order of training."""
