"""FLUX 3 Image Klein, base and distilled: read family.py first, then model.py."""
