"""HunyuanVideo 1.5, clips from text or an image: read family.py first, then model.py."""
