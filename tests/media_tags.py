"""Text that images and videos carry."""

from modules.media.tags import read_tags

__all__ = ["read_tags"]
