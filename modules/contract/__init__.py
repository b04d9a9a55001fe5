"""What a model family tells the shared loops: read family.py first.

data: records of latents and of what caches and encoders hand over
family: the protocols that loops call, and how a model is trained
loading: records of how and where a network is loaded
requests: what is asked for, settled, and checked alike
rules: experts, releases, sources, guidance, token limits of a model
steps: sections, one call of the network, one step
"""
