"""Tools for finished videos: read, one stage or several, write, all as one stream."""
