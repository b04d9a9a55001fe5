"""Blur the boxes of a detector, also in frames where it misses them.

stage: blur the found boxes of each frame
tracks: follow boxes from frame to frame
"""
