"""HunyuanVideo and SkyReels V1: read family.py first, then model.py."""
