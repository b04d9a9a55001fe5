"""Text that images and videos carry."""

from modules.media.reading import read_tags

__all__ = ["read_tags"]
