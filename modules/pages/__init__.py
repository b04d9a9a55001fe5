"""HTML pages: one file each, of one style sheet."""
