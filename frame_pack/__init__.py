"""FramePack and FramePack-F1: read family.py first, then sections.py."""
