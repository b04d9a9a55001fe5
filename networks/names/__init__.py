"""How families write down the names of their network's modules in every layout: each has them in names.py.

layouts: how names and their order are written down, renaming tensors
texts: published paths of text encoders' modules, and diffusers' ones
"""
