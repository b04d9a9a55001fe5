"""Small layers and rules that several models share.

convolution: a 3D convolution, fast for small clips on CPU
enlarging: enlarge frames by repeating pixels
memory_layouts: memory layouts of clips and frames
modulation: shift, scale and gate of adaptive norms
norms: normalisation layers of the transformers
precision: the dtype that a layer computes in
rope: rotary position embeddings over several axes
sinusoid: sinusoidal embeddings of numbers such as timesteps
"""
