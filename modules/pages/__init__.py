"""HTML pages: one file each, without scripts.

charts: draw curves over steps, with axes
options: options of share_page.py: page and result
page: write a page of one file, with embedded pictures
"""
