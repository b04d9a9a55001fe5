"""FLUX.1 and Chroma: read family.py first, then model.py."""
