"""HunyuanImage-2.1: read family.py first, then model.py."""
