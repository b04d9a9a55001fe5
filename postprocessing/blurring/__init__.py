"""Blur the boxes of a detector, also in frames where it misses them."""
