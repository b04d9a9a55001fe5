"""Blur what a detector finds, and keep it blurred.

options: options of blurring: detector, form and size
stage: blur the found boxes of each picture
tracks: follow boxes from picture to picture
"""
