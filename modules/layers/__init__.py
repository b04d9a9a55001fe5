"""Small layers and rules that several models share.

convolution: convolutions, memory layouts and enlarging of clips
half_rope: rotation of pairs across the halves of a head
modulation: shift, scale and gate of adaptive norms
norms: norms, two layers in a row, dtypes of layers
rope: rotary embeddings over several axes, and sinusoids
"""
