"""HTML pages: one file each, of one style sheet.

charts: draw curves over steps, with axes
language: texts in the language of a page
page: write a page of one file, with embedded images
"""
