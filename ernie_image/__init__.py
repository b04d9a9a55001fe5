"""ERNIE-Image, base and Turbo: read family.py first, then model.py."""
