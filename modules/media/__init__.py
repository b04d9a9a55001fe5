"""Images and videos on disk, and their pixels."""
