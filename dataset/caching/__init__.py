"""The caching loop and its two halves."""
