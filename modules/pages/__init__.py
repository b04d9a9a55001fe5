"""HTML pages: one file each, without scripts.

charts: draw curves over steps, with axes
page: write a page of one file, with embedded pictures
"""
