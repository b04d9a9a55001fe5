"""Fit a network into device memory: keep parts of it in host memory, and recompute activations.

block_swap: copy blocks from host memory before they run
checkpointing: gradient checkpointing, from outside the network
host_memory: pinned and shared memory for fast copies
loaded: a network loaded when needed, freed for others
options: options that keep blocks in host memory
swap_plan: choose which weights stay in host memory
token_pieces: token-wise layers in pieces, to save memory
transfer: copies that overlap with the device's computation
turns: networks take turns on a device
"""
