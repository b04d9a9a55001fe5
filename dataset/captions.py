"""Caption files, and captions that are missing."""
