"""Media and captions on disk."""
