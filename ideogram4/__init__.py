"""Ideogram 4, with and without its second network: read family.py first, then model.py."""
