"""Qwen-Image-2.1, base and Turbo: read family.py first, then model.py."""
