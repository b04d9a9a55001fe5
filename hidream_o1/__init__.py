"""HiDream-O1-Image, a language model that draws pixels: read family.py first, then model.py."""
