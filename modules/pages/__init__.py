"""HTML pages: one file each, without scripts.

charts: draw curves over steps, with axes
embedding: embed pictures and clips in a page as data
options: options of share_page.py: page and result
page: write a page of one file, without scripts
"""
