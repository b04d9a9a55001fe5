"""How families write down the names of their network's modules in every layout: each has them in names.py.

layouts: how names are written down, and renaming tensors
numbering: order in which known trainers number a LoRA's modules
texts: published paths of text encoders' modules, and diffusers' ones
"""
