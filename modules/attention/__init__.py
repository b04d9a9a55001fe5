"""One function of attention over a table of back ends.

attend: the only entry: back ends, packages, packed samples
sdpa: torch's scaled_dot_product_attention, with the best kernels
"""
