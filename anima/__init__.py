"""Anima, of any depth: read family.py first, then model.py."""
