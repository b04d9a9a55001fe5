"""Cache files: contents, and what they were made from."""
