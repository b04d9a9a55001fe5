"""Linear layers with weights in 8 bits.

products: products of a frozen fp8 weight, with gradient
weights: linear layers with 8-bit weights: rounding and computing
"""
