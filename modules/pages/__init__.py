"""HTML pages: one file each, with a common style sheet.

charts: draw curves over steps, with axes
language: show text in the language of a page
page: write a page as one file, with embedded pictures
"""
