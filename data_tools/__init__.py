"""Tools round a dataset, used before caching: captions, and clips cut from footage.

captions/: write and edit captions with a vision-language model
cutting/: find scenes in footage, and write clips of them
"""
