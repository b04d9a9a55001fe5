"""Qwen-Image: read family.py first, then model.py."""
