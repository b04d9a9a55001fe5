"""Krea 2, raw, Turbo and edits: read family.py first, then model.py."""
