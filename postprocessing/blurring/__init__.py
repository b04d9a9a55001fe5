"""Blur the boxes of a detector, also in pictures where it misses them.

stage: blur the found boxes of each picture
tracks: follow boxes from picture to picture
"""
