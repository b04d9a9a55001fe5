"""Cache files: names, contents, and what they were made from."""
