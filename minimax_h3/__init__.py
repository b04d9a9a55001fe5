"""MiniMax-H3, video with audio: read family.py first, then model.py."""
