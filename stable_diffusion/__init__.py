"""Stable Diffusion 1.x, 2.x, XL. Read run.py, then making.py for gen_img.py; family.py for the loops."""
