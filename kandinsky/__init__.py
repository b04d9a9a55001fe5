"""Kandinsky 5, clips and images: read family.py first, then model.py."""
