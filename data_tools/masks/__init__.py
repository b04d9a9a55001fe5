"""Make masks for the pictures and clips of a folder, and change single ones.

places: where masks lie; accept, invert, remove, replace, undo
"""
