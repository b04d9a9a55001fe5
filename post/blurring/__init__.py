"""Blur what a detector finds, and keep it blurred.

stage: blur the found boxes of each picture
tracks: follow boxes from picture to picture
"""
