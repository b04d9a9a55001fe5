"""LTX-2, 2.3 and 2.5, video with audio: read family.py first, then model.py."""
