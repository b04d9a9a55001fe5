"""Make masks for the images and clips in a folder, and change single masks.

options: options of tools/mask.py: what to find, the masks' shape
places: where masks lie; accept, invert, remove, replace, undo
run: make the masks that a folder lacks
seen: find the foreground, faces or a color
shaping: from a network's values to a mask; steady clips
words: find what words describe, with CLIPSeg or SAM 3
"""
