"""Wan2.1 and Wan2.2: read family.py first, then model.py."""
