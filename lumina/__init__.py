"""Lumina-Image-2.0: read family.py first, then model.py."""
