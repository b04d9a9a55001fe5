"""Linear layers with weights in 8 bits.

options: options for 8-bit weights of the transformer and 8-bit products
products: products of a frozen fp8 weight, with gradient
weights: linear layers with 8-bit weights: rounding and computing
"""
