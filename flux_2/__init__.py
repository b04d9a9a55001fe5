"""FLUX.2 dev and klein: read family.py first, then model.py."""
