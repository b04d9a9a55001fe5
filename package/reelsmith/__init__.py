"""Teach open video models something new, and make videos with them.

__main__: python -m reelsmith, the same as reelsmith
commands: words to scripts, and the list of all
"""
