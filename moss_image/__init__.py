"""MOSS-Image, Base and SFT: read family.py first, then model.py."""
